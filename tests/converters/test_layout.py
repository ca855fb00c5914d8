"""The layout algebra against loops: packing, unpacking, and what each tensor-parallel rank owns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.layout import COLUMN, COPY, GATED, QKV, ROW, VOCAB, Box, Layout
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.tensors import InMemory
from tests.converters import naive

PROPERTY = settings(deadline=None, max_examples=80)


def make_config(groups: int, heads_per_group: int, head_dim: int, **others: Any) -> ModelConfig:
    return ModelConfig(
        **{
            "num_layers": 2,
            "hidden_size": 6,
            "ffn_hidden_size": 8,
            "num_attention_heads": groups * heads_per_group,
            "num_query_groups": groups,
            "kv_channels": head_dim,
            "vocab_size": 12,
            **others,
        }
    )


@st.composite
def attention(draw: st.DrawFn) -> tuple[ModelConfig, int]:
    """A config and a TP size that divides its groups."""
    tp = draw(st.integers(1, 4))
    groups = tp * draw(st.integers(1, 3))
    return make_config(groups, draw(st.integers(1, 4)), draw(st.integers(1, 5))), tp


def numbered(*shape: int) -> Tensor:
    """A tensor whose elements all differ."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def qkv_parts(config: ModelConfig, width: int | None) -> list[Tensor]:
    rows = [n * config.kv_channels for n in (config.num_attention_heads, *[config.num_query_groups] * 2)]
    whole = numbered(sum(rows), *(() if width is None else (width,)))
    return list(whole.split(rows))


def cut(tensor: Tensor, box: Box) -> Tensor:
    part = tensor[box.row : box.row + box.rows]
    return part if box.columns is None else part[:, box.column : box.column + box.columns]


def rank_tensor(layout: Layout, tensor: Tensor, config: ModelConfig, tp: int, rank: int) -> Tensor:
    """What the boxes give one rank, the boxes one below the other."""
    return torch.cat([cut(tensor, box) for box in layout.boxes(tuple(tensor.shape), config, tp)[rank]])


@PROPERTY
@given(attention(), st.sampled_from([None, 1, 7]))
def test_qkv_packs_as_the_loop_does_and_unpacks_to_the_parts(drawn: tuple[ModelConfig, int], width: int | None) -> None:
    config, _ = drawn
    parts = qkv_parts(config, width)
    packed = QKV.pack([InMemory(part) for part in parts], config)
    expected = naive.qkv(*parts, groups=config.num_query_groups, head_dim=config.kv_channels)
    assert torch.equal(packed.read(), expected)
    assert packed.shape == tuple(expected.shape)
    assert QKV.part_shapes(packed.shape, config) == [tuple(part.shape) for part in parts]
    for back, part in zip(QKV.unpack(packed, config), parts, strict=True):
        assert torch.equal(back.read(), part)


@PROPERTY
@given(attention(), st.sampled_from([None, 1, 7]))
def test_a_rank_of_qkv_owns_whole_groups(drawn: tuple[ModelConfig, int], width: int | None) -> None:
    config, tp = drawn
    parts = qkv_parts(config, width)
    packed = QKV.pack([InMemory(part) for part in parts], config).read()
    here = config.num_query_groups // tp
    for rank in range(tp):
        mine = [part.chunk(tp)[rank] for part in parts]  # a rank's own q, k and v heads, packed on their own
        expected = naive.qkv(*mine, groups=here, head_dim=config.kv_channels)
        assert torch.equal(rank_tensor(QKV, packed, config, tp, rank), expected)


@PROPERTY
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5))
def test_a_rank_of_a_gated_pair_holds_its_gate_rows_above_its_up_rows(tp: int, width: int, hidden: int) -> None:
    ffn, config = tp * width, make_config(1, 1, 2)
    gate_proj, up_proj = numbered(2 * ffn, hidden).split(ffn)
    packed = GATED.pack([InMemory(gate_proj.clone()), InMemory(up_proj.clone())], config)
    assert torch.equal(packed.read(), torch.cat([gate_proj, up_proj]))
    assert [tuple(part.read().shape) for part in GATED.unpack(packed, config)] == [(ffn, hidden)] * 2
    assert torch.equal(GATED.unpack(packed, config)[1].read(), up_proj)
    for rank in range(tp):
        rows = slice(rank * width, (rank + 1) * width)
        expected = torch.cat([gate_proj[rows], up_proj[rows]])
        assert torch.equal(rank_tensor(GATED, packed.read(), config, tp, rank), expected)
        assert len(GATED.boxes(packed.shape, config, tp)[rank]) == 2  # never one box across the middle


@PROPERTY
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5))
def test_columns_rows_and_copies_are_cut_as_torch_chunks_them(tp: int, width: int, other: int) -> None:
    config = make_config(1, 1, 2)
    tall, wide = numbered(tp * width, other), numbered(other, tp * width)
    for rank in range(tp):
        for layout in (COLUMN, VOCAB):
            assert torch.equal(rank_tensor(layout, tall, config, tp, rank), tall.chunk(tp)[rank])
        assert torch.equal(rank_tensor(ROW, wide, config, tp, rank), wide.chunk(tp, dim=1)[rank])
        assert torch.equal(rank_tensor(COPY, tall, config, tp, rank), tall)


@PROPERTY
@given(attention(), st.sampled_from([QKV, GATED, COLUMN, VOCAB, ROW]), st.integers(1, 4))
def test_the_boxes_of_all_ranks_tile_the_tensor_exactly_once(
    drawn: tuple[ModelConfig, int], layout: Layout, factor: int
) -> None:
    config, tp = drawn
    rows = {
        "qkv": (config.num_attention_heads + 2 * config.num_query_groups) * config.kv_channels,
        "gated": 2 * tp * factor,
        "column": tp * factor,
        "vocab": tp * factor,
        "row": factor,
    }[layout.name]
    shape = (rows, tp * 3)
    times = torch.zeros(shape, dtype=torch.int32)
    ranks = layout.boxes(shape, config, tp)
    assert len(ranks) == tp
    for boxes in ranks:
        starts = [(box.row, box.column) for box in boxes]
        assert starts == sorted(starts)
        for box in boxes:
            cut(times, box).add_(1)
    assert bool((times == 1).all())


@pytest.mark.parametrize(
    ("layout", "shape", "tp", "numbers"),
    [
        (QKV, (24, 6), 4, ("3", "4")),  # three query groups over four ranks
        (QKV, (24,), 2, ("3", "2")),
        (GATED, (20, 6), 4, ("10", "4")),
        (COLUMN, (10, 6), 3, ("10", "3")),
        (VOCAB, (250, 6), 4, ("250", "4")),
        (ROW, (6, 10), 3, ("10", "3")),
    ],
)
def test_a_size_that_does_not_divide_is_refused_with_both_numbers(
    layout: Layout, shape: tuple[int, ...], tp: int, numbers: tuple[str, str]
) -> None:
    with pytest.raises(BadInputError) as refused:
        layout.boxes(shape, make_config(3, 2, 2), tp)
    words = str(refused.value).replace(":", " ").split()
    assert all(number in words for number in numbers), str(refused.value)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"tp": 3}, ("tp", "3", "num_attention_heads", "8")),
        ({"tp": 8}, ("tp", "8", "num_query_groups", "4")),
        ({"pp": 3}, ("pp", "3", "num_layers", "4")),
        ({"pp": 2, "vpp": 4}, ("vpp", "8", "num_layers", "4")),
        ({"ep": 3}, ("ep", "3", "num_moe_experts", "8")),
        ({"ep": 2, "etp": 5}, ("etp", "5", "moe_ffn_hidden_size", "48")),
        ({"tp": 4}, ("tp", "4", "moe_shared_expert_intermediate_size", "42")),
    ],
)
def test_a_layout_that_a_model_cannot_be_cut_into_names_both_numbers(
    sizes: dict[str, int], words: tuple[str, ...]
) -> None:
    config = make_config(
        4,
        2,
        8,
        num_layers=4,
        num_moe_experts=8,
        moe_ffn_hidden_size=48,
        moe_shared_expert_intermediate_size=42,
    )
    with pytest.raises(BadInputError) as refused:
        ParallelLayout(**sizes).check(config)
    assert all(word in str(refused.value) for word in words), str(refused.value)


def test_experts_of_a_dense_model_and_sizes_below_one_are_refused() -> None:
    with pytest.raises(BadInputError, match="no experts"):
        ParallelLayout(ep=2).check(make_config(2, 1, 2))
    with pytest.raises(BadInputError, match="etp"):
        ParallelLayout(etp=2).check(make_config(2, 1, 2))
    for sizes in ({"tp": 0}, {"pp": -1}, {"ep": 0}, {"etp": 0}, {"vpp": 0}, {"vpp": 2}):
        with pytest.raises(BadInputError, match=next(iter(sizes))):
            ParallelLayout(**sizes)


def test_parts_that_do_not_fill_the_view_are_refused() -> None:
    config = make_config(2, 2, 4)
    parts = [InMemory(numbered(rows, 3)) for rows in (16, 8, 7)]
    with pytest.raises(BadInputError, match="7 rows"):
        QKV.pack(parts, config)
