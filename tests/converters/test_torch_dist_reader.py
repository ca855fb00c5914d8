"""Folders that others wrote: chunks cut in any way, files by torch's own writer, objects and optimizers beside."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import warnings
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.mcore.args_reading import config_from_args
from ckptbridge.converters.mcore.torch_dist_reader import open_torch_dist
from ckptbridge.converters.model import open_model
from ckptbridge.converters.model_config import ModelConfig
from tests.conftest import TinyFolders
from tests.converters.test_round_trip import assert_same, expected_tensors, weights

Cut = tuple[tuple[int, ...], tuple[int, ...]]
"""(offsets, sizes) of a chunk"""


def write_folder(folder: Path, tensors: dict[str, tuple[Tensor, list[Cut]]], common: Any = None) -> Path:
    """A torch_dist folder with these chunks, in two files, written with torch.save and pickle alone."""
    folder.mkdir(parents=True, exist_ok=True)
    entries: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    files = [bytearray(), bytearray()]

    def put(value: Any) -> _StorageInfo:
        number = len(places) % 2
        out = io.BytesIO()
        torch.save(value, out)
        at = len(files[number])
        files[number].extend(out.getvalue())
        return _StorageInfo(f"__{number}_0.distcp", at, len(out.getvalue()))

    for key, (tensor, cuts) in tensors.items():
        chunks: list[ChunkStorageMetadata] = []
        for offsets, sizes in cuts:
            part = tensor
            for axis, (at, size) in enumerate(zip(offsets, sizes, strict=True)):
                part = part.narrow(axis, at, size)
            places[MetadataIndex(key, torch.Size(offsets))] = put(part.clone())
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
        entries[key] = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.size(), chunks)
    if common is not None:
        entries["common_state/shard_0_1"] = BytesStorageMetadata()
        places[MetadataIndex("common_state/shard_0_1")] = put([common])
    for number, data in enumerate(files):
        (folder / f"__{number}_0.distcp").write_bytes(data)
    metadata = Metadata(state_dict_metadata=entries, planner_data=None, storage_data=places)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    return folder


def _tilings(draw: st.DrawFn, offsets: tuple[int, ...], sizes: tuple[int, ...], depth: int) -> Iterator[Cut]:
    """Split a box along a random axis, again and again: any tiling that straight cuts can make."""
    axes = [axis for axis, size in enumerate(sizes) if size > 1]
    if not axes or depth == 0 or draw(st.integers(0, 3)) == 0:
        yield offsets, sizes
        return
    axis = draw(st.sampled_from(axes))
    at = draw(st.integers(1, sizes[axis] - 1))
    for start, size in ((0, at), (at, sizes[axis] - at)):
        moved = (*offsets[:axis], offsets[axis] + start, *offsets[axis + 1 :])
        yield from _tilings(draw, moved, (*sizes[:axis], size, *sizes[axis + 1 :]), depth - 1)


@st.composite
def tiled(draw: st.DrawFn) -> tuple[Tensor, list[Cut], int]:
    """A tensor, a tiling in any order, and how many of its axes are stacked."""
    depth = draw(st.integers(0, 2))
    shape = draw(st.tuples(*[st.integers(1, 4)] * depth, *[st.integers(1, 7)] * draw(st.integers(1, 2))))
    cuts = list(_tilings(draw, (0,) * len(shape), shape, depth=4))
    tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    return tensor, draw(st.permutations(cuts)), depth


@settings(deadline=None, max_examples=150)
@given(tiled())
def test_chunks_cut_in_any_way_are_put_together(
    tmp_path_factory: pytest.TempPathFactory, drawn: tuple[Tensor, list[Cut], int]
) -> None:
    tensor, cuts, depth = drawn
    folder = write_folder(tmp_path_factory.mktemp("tiled"), {"a": (tensor, cuts)})
    whole = open_torch_dist(folder).tensors["a"]
    for index in itertools.product(*(range(n) for n in tensor.shape[:depth])):
        part, expected = whole.part(index), tensor[index]
        assert part.shape == tuple(expected.shape)
        assert torch.equal(part.read(), expected)
        middle = expected.shape[0] // 2
        assert torch.equal(part.read_rows(middle, expected.shape[0]), expected[middle:])
    for chunk in whole.chunks:
        box = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
        assert torch.equal(whole.saved(chunk).read(), tensor[box])


def test_overlapping_chunks_are_refused_when_they_leave_a_gap(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).reshape(4, 3)
    cuts: list[Cut] = [((0, 0), (2, 3)), ((1, 0), (2, 3))]  # twelve elements, but not the last row
    folder = open_torch_dist(write_folder(tmp_path, {"a": (tensor, cuts)}))
    with pytest.raises(BadInputError, match="a: no chunk holds row 3"):
        folder.tensors["a"].part(())


def _args(**changes: Any) -> Namespace:
    values = {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "group_query_attention": True,
        "kv_channels": 8,
        "max_position_embeddings": 128,
        "position_embedding_type": "rope",
        "rotary_base": 10000,
        "normalization": "RMSNorm",
        "norm_epsilon": 1e-5,
        "swiglu": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": True,
        "padded_vocab_size": 256,
        "vocab_size": 250,
        "num_experts": None,
    }
    return Namespace(**values | changes)


def test_a_folder_of_torchs_own_writer_is_read(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    """Whole stacked tensors, one file, objects as one-element lists, no hf folder, no extra state."""
    state: dict[str, Any] = dict(expected_tensors(tiny_folder("llama"), tp=1, per_layer_keys=False))
    state["common_state/shard_0_1"] = [{"args": _args(), "iteration": 42, "checkpoint_version": 3.0}]
    state["rng_state/shard_0_1"] = [[{"random": [1, 2]}]]
    folder = tmp_path / "run" / "iter_0000042"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(
            state,
            storage_writer=dcp.FileSystemWriter(folder, single_file_per_rank=True),
            planner=DefaultSavePlanner(flatten_state_dict=False),
            no_dist=True,
        )
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("42\n")
    model = open_model(tmp_path / "run")
    assert (model.iteration, model.family.name) == (42, "llama")
    execute(plan_conversion(model, tmp_path / "hf", "hf", ConvertOptions(workers=1)))
    assert_same(weights(tmp_path / "hf"), weights(tiny_folder("llama")))


def test_optimizers_under_any_of_megatrons_prefixes_are_left_aside(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    """`chained_0.` stands before the keys of a mixture's optimizers unless a save avoids it."""
    plain = expected_tensors(tiny_folder("llama"), tp=1, per_layer_keys=False)
    tensors = {key: (tensor, [((0,) * tensor.ndim, tuple(tensor.shape))]) for key, tensor in plain.items()}
    key = "decoder.final_layernorm.weight"
    for prefix in (
        "optimizer.state.exp_avg.",
        "chained_0.optimizer.state.exp_avg.",
        "chained_1.optimizer.state.param.",
    ):
        tensors[prefix + key] = tensors[key]
    write_folder(tmp_path / "run", tensors, {"args": _args(), "iteration": 1})
    assert set(open_model(tmp_path / "run").tensors) == set(open_model(tiny_folder("llama")).tensors)


def test_more_padding_than_ours_is_cut_off(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    """Another TP size pads the vocabulary to other multiples; what it pads with is not ours to judge."""
    plain = dict(expected_tensors(tiny_folder("llama"), tp=1, per_layer_keys=False))
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        plain[name] = torch.cat([plain[name][:250], torch.full((774, 64), 7.0)])
    tensors = {key: (tensor, [((0,) * tensor.ndim, tuple(tensor.shape))]) for key, tensor in plain.items()}
    write_folder(tmp_path / "run", tensors, {"args": _args(padded_vocab_size=1024), "iteration": 1})
    execute(plan_conversion(open_model(tmp_path / "run"), tmp_path / "hf", "hf", ConvertOptions(workers=1)))
    assert_same(weights(tmp_path / "hf"), weights(tiny_folder("llama")))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["vocab_size"] == 250


MOE = {"num_experts": 4, "moe_ffn_hidden_size": 96, "moe_router_topk": 2}


def _config_or_refusal(args: Namespace) -> ModelConfig | str:
    try:
        return config_from_args(args, "release")
    except BadInputError as refused:
        return str(refused)


@pytest.mark.parametrize(
    "change",
    [
        {"normalization": "LayerNorm"},
        {"position_embedding_type": "learned_absolute"},
        {"swiglu": False},
        {"squared_relu": True},
        {"add_bias_linear": True},
        {"rotary_percent": 0.5},
        {"rotary_interleaved": True},
        {"rotary_seq_len_interpolation_factor": 2},
        {"multi_latent_attention": True},
        {"mtp_num_layers": 1},
        {"apply_layernorm_1p": True},
        {"layernorm_zero_centered_gamma": True},
        {"window_attn_skip_freq": 2},
        {"softmax_type": "off-by-one"},
        {"softmax_scale": 0.5},
        {"no_rope_freq": 4},
        {"no_rope_freq": [0, 0, 0, 1]},
        {"qk_l2_norm": True},
        {"glu_linear_offset": 1.0},
        {"activation_func_clamp_value": 7.0},
        {"apply_residual_connection_post_layernorm": True},
        {"use_mup": True},
        {"moe_router_score_function": "sigmoid", **MOE},
        {"moe_router_topk_scaling_factor": 2.5, **MOE},
        {"moe_router_enable_expert_bias": True, **MOE},
        {"moe_router_group_topk": 1, "moe_router_num_groups": 2, **MOE},
        {"moe_apply_probs_on_input": True, **MOE},
    ],
    ids=lambda change: next(iter(change)),
)
def test_args_of_a_model_that_computes_something_else_are_not_passed_over(change: dict[str, Any]) -> None:
    """Each leaves the names and shapes of every tensor as they are: nothing else would tell."""
    plain = config_from_args(_args(**{key: value for key, value in change.items() if key in MOE}), "release")
    told = _config_or_refusal(_args(**change))
    assert told != plain
    assert not isinstance(told, str) or (next(iter(change)) in told and "release" in told)


@pytest.mark.parametrize(
    "change",
    [
        {"position_embedding_type": "learned_absolute"},
        {"rotary_interleaved": True},
        {"softmax_type": "off-by-one"},
        {"no_rope_freq": 4},
        {"no_rope_freq": [0, 0, 0, 1]},
        {"qk_l2_norm": True},
        {"apply_residual_connection_post_layernorm": True},
        {"mup_base_hidden_size": 8, "use_mup": True},
        {"mup_attn_scale_power": 0.5, "use_mup": True},
        {"moe_apply_probs_on_input": True, **MOE},
        {"attention_output_gate": True},
        {"experimental_attention_variant": "gated_delta_net"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_args_of_what_no_version_of_ours_computes_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BadInputError) as refused:
        config_from_args(_args(**change), "release")
    assert next(iter(change)) in str(refused.value)
    assert "release" in str(refused.value)


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 0},
        {"num_layers": 4.0},
        {"num_layers": "4"},
        {"hidden_size": None},
        {"moe_layer_freq": [1, 1], **MOE},
        {"moe_router_topk": 5, "num_experts": 4, "moe_ffn_hidden_size": 96},
        {"window_size": 7},
        {"rotary_base": "many"},
        {"mup_output_mult": 0.0, "use_mup": True},
    ],
    ids=str,
)
def test_args_that_no_run_can_have_had_are_bad_input(change: dict[str, Any]) -> None:
    with pytest.raises(BadInputError, match="release") as refused:
        config_from_args(_args(**change), "release")
    assert next(iter(change)) in str(refused.value)
