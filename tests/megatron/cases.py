"""What the one job on real megatron-core ranks goes through: loads of our checkpoints, planted faults, saves."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from tests.megatron.hf_to_megatron import megatron_kwargs
from tests.megatron.launch import Layout, Load, Save
from tests.tiny import TINY, reference_logits, save_tiny, token_ids

DENSE_LAYOUTS = (Layout(), Layout(tp=2), Layout(tp=4), Layout(pp=2), Layout(tp=2, pp=2))
MOE_LAYOUTS = (
    *DENSE_LAYOUTS,
    Layout(ep=2),
    Layout(ep=4),
    Layout(tp=2, etp=2),
    Layout(tp=2, ep=2),
    Layout(tp=2, ep=2, etp=2),
    Layout(pp=2, ep=2),
)
SAVE_LAYOUTS = (Layout(), Layout(tp=2), Layout(pp=2))
MOE_SAVE_LAYOUTS = (*SAVE_LAYOUTS, Layout(ep=2), Layout(tp=2, ep=2, etp=2))

LOADS = [(name, layout) for name in TINY for layout in (MOE_LAYOUTS if TINY[name].is_moe else DENSE_LAYOUTS)]
SAVES = [(name, layout) for name in TINY for layout in (MOE_SAVE_LAYOUTS if TINY[name].is_moe else SAVE_LAYOUTS)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A model converted in another way than the default, loaded under a layout that it was not cut for."""

    model: str
    load_under: Layout
    options: ConvertOptions
    dtype: torch.dtype = torch.float32


VARIANTS: dict[str, Variant] = {
    "uncut_dense": Variant(model="llama", load_under=Layout(tp=2, pp=2), options=ConvertOptions()),
    "uncut_moe": Variant(model="qwen2_moe", load_under=Layout(tp=2, ep=2, etp=2), options=ConvertOptions()),
    "layer_numbers_in_keys_dense": Variant(
        model="qwen2_tied",
        load_under=Layout(tp=2, pp=2),
        options=ConvertOptions(layout=ParallelLayout(tp=2), per_layer_keys=True),
    ),
    "layer_numbers_in_keys_moe": Variant(
        model="qwen3_moe",
        load_under=Layout(pp=2, ep=2),
        options=ConvertOptions(layout=ParallelLayout(ep=4), per_layer_keys=True),
    ),
    "many_files": Variant(
        model="mixtral",
        load_under=Layout(ep=2),
        options=ConvertOptions(layout=ParallelLayout(tp=2, pp=2, ep=2, etp=1), max_file_size=100_000),
    ),
    "bf16": Variant(
        model="mixtral",
        load_under=Layout(tp=2, ep=2),
        options=ConvertOptions(layout=ParallelLayout(tp=2)),
        dtype=torch.bfloat16,
    ),
}

Tensors = dict[str, Tensor]


def _swap(tensors: Tensors, one: str, other: str) -> None:
    tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()


def _swap_gate_and_up(tensors: Tensors) -> None:
    _swap(tensors, "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight")


def _swap_experts(tensors: Tensors) -> None:
    for matrix in ("gate_proj", "up_proj", "down_proj"):
        expert = "model.layers.2.mlp.experts.{}." + matrix + ".weight"
        _swap(tensors, expert.format(1), expert.format(6))


def _swap_q_and_k_norm(tensors: Tensors) -> None:
    _swap(tensors, "model.layers.0.self_attn.q_norm.weight", "model.layers.0.self_attn.k_norm.weight")


def _transpose_fc2(tensors: Tensors) -> None:
    name = "model.layers.3.block_sparse_moe.experts.2.w2.weight"
    tensors[name] = tensors[name].T.reshape(tensors[name].shape).contiguous()


def _rotate_heads(tensors: Tensors) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = tensors[name].roll(8, 0)


def _rope_theta(config: dict[str, Any]) -> None:
    config["rope_parameters"]["rope_theta"] *= 2


def _no_rope_scaling(config: dict[str, Any]) -> None:
    config["rope_parameters"]["rope_type"] = "default"


def _wider_window(config: dict[str, Any]) -> None:
    config["sliding_window"] += 1


def _softmax_order(config: dict[str, Any]) -> None:
    config["norm_topk_prob"] = not config["norm_topk_prob"]


def _epsilon(config: dict[str, Any]) -> None:
    config["rms_norm_eps"] *= 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A change of the weights, or of the config that megatron-core is given; both are right before it."""

    model: str
    layout: Layout
    weights: Callable[[Tensors], None] | None = None
    config: Callable[[dict[str, Any]], None] | None = None


FAULTS: dict[str, Fault] = {
    "gate_proj and up_proj swapped": Fault(model="llama", layout=Layout(tp=2), weights=_swap_gate_and_up),
    "two experts swapped": Fault(model="qwen3_moe", layout=Layout(ep=4), weights=_swap_experts),
    "q and k norm swapped": Fault(model="qwen3", layout=Layout(pp=2), weights=_swap_q_and_k_norm),
    "one expert's fc2 transposed": Fault(model="mixtral", layout=Layout(tp=2, ep=2, etp=2), weights=_transpose_fc2),
    "query heads shifted by one": Fault(model="qwen2", layout=Layout(tp=2, pp=2), weights=_rotate_heads),
    "wrong rope theta": Fault(model="qwen2", layout=Layout(), config=_rope_theta),
    "no rope scaling": Fault(model="llama_rope_scaled", layout=Layout(), config=_no_rope_scaling),
    "window wider by one": Fault(model="mistral", layout=Layout(tp=2), config=_wider_window),
    "softmax in the wrong order": Fault(model="qwen2_moe", layout=Layout(ep=2), config=_softmax_order),
    "norm epsilon ten times too large": Fault(model="qwen2", layout=Layout(), config=_epsilon),
}

# What `mislabelled_case` does to a checkpoint's keys.
RENAMED, RENAMED_TO = "decoder.final_layernorm.weight", "decoder.final_norm.weight"
DROPPED = "decoder.layers.self_attention.linear_proj._extra_state"


def layout_for(name: str) -> ParallelLayout:
    """The layout for which a tiny model's chunks are cut in these tests."""
    return ParallelLayout(tp=2, ep=2) if TINY[name].is_moe else ParallelLayout(tp=2)


def to_megatron(hf: Path, target: Path, options: ConvertOptions) -> Path:
    """Convert a Hugging Face folder; returns the folder that megatron-core loads."""
    execute(plan_conversion(open_model(hf), target, "torch_dist", options))
    return target / "release"


def load_case(folder: Path, hf: Path, layout: Layout, expected: Tensor) -> Load:
    """A load of `folder` into a model made from the config.json in `hf`."""
    return Load(folder=folder, layout=layout, config=megatron_config(hf), tokens=token_ids(), expected=expected)


def variant_case(name: str, folder: Path) -> Load:
    """The load of a variant, converted under `folder`."""
    variant = VARIANTS[name]
    hf = save_tiny(variant.model, folder / "hf", variant.dtype)
    converted = to_megatron(hf, folder / "megatron", variant.options)
    return load_case(converted, hf, variant.load_under, reference_logits(hf, token_ids()))


def fault_case(name: str, hf: Path, folder: Path) -> Load:
    """The load of a checkpoint with a fault, made under `folder`; it expects the faultless model's logits."""
    fault = FAULTS[name]
    faulty = folder / "hf"
    faulty.mkdir()
    tensors = {key: tensor for file in sorted(hf.glob("*.safetensors")) for key, tensor in load_file(file).items()}
    if fault.weights:
        fault.weights(tensors)
    save_file(tensors, faulty / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(hf / "config.json", faulty)
    converted = to_megatron(faulty, folder / "megatron", ConvertOptions(layout=layout_for(fault.model)))
    if fault.config:
        config = json.loads((faulty / "config.json").read_text())
        fault.config(config)
        (faulty / "config.json").write_text(json.dumps(config))
    return load_case(converted, faulty, fault.layout, reference_logits(hf, token_ids()))


def mislabelled_case(converted: Path, hf: Path, folder: Path, expected: Tensor) -> Load:
    """A load of a copy in which one tensor has another key and one module's extra states are gone."""
    shutil.copytree(converted, folder)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    entries = metadata.state_dict_metadata
    entries[RENAMED_TO] = entries.pop(RENAMED)
    for key in [key for key in entries if key.startswith(DROPPED)]:
        del entries[key]
    stored = metadata.storage_data
    metadata.storage_data = {
        (replace(index, fqn=RENAMED_TO) if index.fqn == RENAMED else index): info
        for index, info in stored.items()
        if not index.fqn.startswith(DROPPED)
    }
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return load_case(folder, hf, Layout(pp=2), expected)


def save_case(hf: Path, folder: Path, layout: Layout, *, local_names: bool = False) -> Save:
    """A save by megatron-core of a model made from the config.json in `hf`."""
    return Save(folder=folder, layout=layout, config=megatron_config(hf), tokens=token_ids(), local_names=local_names)


def megatron_config(hf: Path) -> dict[str, Any]:
    """What megatron-core is given for the config.json in a folder."""
    return megatron_kwargs(json.loads((hf / "config.json").read_text()))
