"""Stacked experts, exchanged rows and columns, rows in turn: against plain torch, however they are cut and nested."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ckptbridge.converters.layout import (
    GATED,
    GATED_COLUMNS_IN_TURN,
    GATED_IN_TURN,
    GATED_WHOLE,
    QKV,
    QKV_WHOLE,
    ROW_TURNED,
    Layout,
)
from ckptbridge.converters.reading import watched
from ckptbridge.converters.tensors import (
    InMemory,
    LazyTensor,
    Stored,
    cast,
    join_columns,
    join_rows,
    reshaped,
    rows,
    scaled,
)
from ckptbridge.converters.turned import EveryNth, InTurn, turned
from tests.converters.test_layout import make_config

ROWS, COLUMNS = 12, 10


def stored(path: Path, tensor: torch.Tensor) -> Stored:
    """The tensor behind some other bytes of a file."""
    path.write_bytes(b"before" + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() + b"behind")
    return Stored(path, 6, tuple(tensor.shape), tensor.dtype)


def forms(tmp_path: Path) -> dict[str, tuple[LazyTensor, torch.Tensor]]:
    """Every form that a matrix can have, and what it is."""
    eager = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).bfloat16()
    file = stored(tmp_path / "a", eager)
    other = stored(tmp_path / "b", -eager)
    return {
        "stored": (file, eager),
        "in memory": (InMemory(eager), eager),
        "cast": (cast(file, torch.float32), eager.float()),
        "scaled": (scaled(file, 3.0), (eager.float() * 3).bfloat16()),
        "rows": (join_rows([file, other], [(2, 9), (0, 3)]), torch.cat([eager[2:9], -eager[:3]])),
        "beside": (join_columns([file, other]), torch.cat([eager, -eager], 1)),
        "turned": (turned(file), eager.T),
        "every third": (EveryNth(file, 1, 3), eager[1::3]),
        "in turn": (InTurn([file, other]), torch.stack([eager, -eager], 1).flatten(0, 1)),
        "turned cast": (turned(cast(file, torch.float32)), eager.T.float()),
        "turned in turn": (turned(InTurn([file, other])), torch.stack([eager, -eager], 1).flatten(0, 1).T),
        "every second turned": (EveryNth(turned(file), 1, 2), eager.T[1::2]),
    }


def test_every_form_is_read_and_turned(tmp_path: Path) -> None:
    for name, (lazy, eager) in forms(tmp_path).items():
        assert lazy.shape == tuple(eager.shape), name
        height, width = eager.shape
        for start, stop in ((0, height), (0, 0), (1, 2), (2, height - 1)):
            assert torch.equal(lazy.read_rows(start, stop), eager[start:stop]), name
            assert torch.equal(turned(lazy).read_rows(0, min(stop, width)), eager[:, : min(stop, width)].T), name


def test_turned_twice_is_the_tensor_itself() -> None:
    matrix = InMemory(torch.zeros(2, 3))
    assert turned(turned(matrix)) is matrix


def test_a_stored_matrix_is_read_once_for_many_rows(tmp_path: Path) -> None:
    lazy = stored(tmp_path / "a", torch.randn(100, 50))
    expected, across = lazy.read(), turned(lazy)
    count: list[int] = []
    with watched(lambda path, offset, block: count.append(len(block))):
        parts = [across.read_rows(at, at + 2) for at in range(0, 50, 2)]
    assert torch.equal(torch.cat(parts), expected.T)
    assert sum(count) == lazy.nbytes


@pytest.mark.parametrize(
    "layout",
    [GATED_WHOLE, GATED_IN_TURN, GATED_COLUMNS_IN_TURN, ROW_TURNED, QKV_WHOLE],
    ids=["whole", "in turn", "columns in turn", "turned", "qkv"],
)
def test_what_is_packed_is_unpacked(layout: Layout) -> None:
    config = make_config(2, 2, 3)
    packed = torch.randn(24, 5)
    (shape,) = layout.part_shapes((24, 5), config)
    (part,) = layout.unpack(InMemory(packed), config)
    assert part.shape == shape
    assert torch.equal(layout.pack([part], config).read(), packed)
    assert torch.equal(layout.pack([InMemory(part.read())], config).read(), packed)


def test_gate_and_up_are_found_where_they_are() -> None:
    gate_proj, up_proj = torch.randn(3, 4), torch.randn(3, 4)
    both = torch.cat([gate_proj, up_proj])
    in_turn = torch.stack([gate_proj, up_proj], 1).flatten(0, 1)
    config = make_config(1, 1, 1)
    assert torch.equal(GATED_WHOLE.pack([InMemory(both)], config).read(), both)
    assert torch.equal(GATED_IN_TURN.pack([InMemory(in_turn)], config).read(), both)
    assert torch.equal(GATED_COLUMNS_IN_TURN.pack([InMemory(in_turn.T)], config).read(), both)
    assert GATED_COLUMNS_IN_TURN.boxes((6, 4), config, 3) == GATED.boxes((6, 4), config, 3)


def test_queries_keys_and_values_in_one_tensor() -> None:
    config = make_config(2, 2, 3)
    q, k, v = torch.randn(12, 5), torch.randn(6, 5), torch.randn(6, 5)
    apart = QKV.pack([InMemory(part) for part in (q, k, v)], config).read()
    assert torch.equal(QKV_WHOLE.pack([InMemory(torch.cat([q, k, v]))], config).read(), apart)


def test_a_stack_is_cut_and_joined_without_reading_it_whole(tmp_path: Path) -> None:
    stack = torch.randn(4, 6, 5)
    flat = reshaped(stored(tmp_path / "a", stack), (24, 5))
    parts = [turned(rows(flat, 6 * expert, 6 * expert + 6)) for expert in range(4)]
    again = reshaped(join_rows(parts), (4, 5, 6))
    assert torch.equal(again.read(), stack.mT)
    assert torch.equal(again.read_rows(1, 3), stack.mT[1:3])
    back = reshaped(again, (20, 6))
    assert torch.equal(turned(rows(back, 5, 10)).read(), stack[1])
