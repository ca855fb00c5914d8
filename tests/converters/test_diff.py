"""diff finds what was planted, and names it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.diff import diff
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from tests.conftest import TinyFolders

Edit = Callable[[dict[str, Tensor]], None]


def swap(one: str, other: str) -> Edit:
    def edit(held: dict[str, Tensor]) -> None:
        held[one], held[other] = held[other], held[one]

    return edit


def edited(source: Path, target: Path, edit: Edit) -> Path:
    """A copy of a Hugging Face folder with its tensors changed, in one file."""
    shutil.copytree(source, target)
    held = {name: tensor for file in target.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for file in (*target.glob("*.safetensors"), *target.glob("*.index.json")):
        file.unlink()
    edit(held)
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, target / "model.safetensors")
    return target


def _transpose(name: str) -> Edit:
    return lambda held: held.update({name: held[name].T.clone()})


def _scale(name: str) -> Edit:
    return lambda held: held.update({name: held[name] * 1.25})


def _round(name: str) -> Edit:
    return lambda held: held.update({name: held[name].bfloat16()})


def _one_value(name: str) -> Edit:
    return lambda held: held[name].view(-1)[:1].add_(1.0)


def _interleave(name: str) -> Edit:
    """Rows of each head as a rope that turns neighbouring pairs wants them."""

    def edit(held: dict[str, Tensor]) -> None:
        heads = held[name].unflatten(0, (-1, 2, 4))
        held[name] = heads.transpose(1, 2).flatten(0, 2).clone()

    return edit


A = "model.layers.1.self_attn"
M = "model.layers.2.mlp"
E = "model.layers.2.block_sparse_moe.experts"
FAULTS: dict[str, tuple[str, Edit, str, str]] = {
    "gate and up": (
        "llama",
        swap(f"{M}.gate_proj.weight", f"{M}.up_proj.weight"),
        "linear_fc1",
        "gate_proj and up_proj",
    ),
    "k and v": ("llama", swap(f"{A}.k_proj.weight", f"{A}.v_proj.weight"), "linear_qkv", "k and v swapped"),
    "interleave": ("llama", _interleave(f"{A}.q_proj.weight"), "linear_qkv", "in another order"),
    "transposed": ("llama", _transpose(f"{A}.o_proj.weight"), "linear_proj", "transposed"),
    "scaled": ("llama", _scale(f"{M}.down_proj.weight"), "linear_fc2", "scaled by 1.25"),
    "rounded": ("llama", _round(f"{M}.down_proj.weight"), "linear_fc2", "rounded to bfloat16"),
    "one value": ("llama", _one_value(f"{M}.down_proj.weight"), "linear_fc2", "values differ"),
    "experts": ("mixtral", swap(f"{E}.1.w2.weight", f"{E}.3.w2.weight"), "experts.1.linear_fc2", "holds expert 3"),
    "layers": (
        "llama",
        swap(f"{M}.down_proj.weight", "model.layers.0.mlp.down_proj.weight"),
        "layers.2.mlp.linear_fc2",
        "holds decoder.layers.0",
    ),
}


@pytest.mark.parametrize("name", ["llama_tied", "mixtral", "qwen2_moe_sparse", "qwen3_moe"])
def test_both_sides_of_a_conversion_are_the_same(name: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = open_model(tiny_folder(name))
    layout = ParallelLayout(tp=2, ep=2) if source.config.num_moe_experts else ParallelLayout(tp=2, pp=2)
    execute(plan_conversion(source, tmp_path / "mcore", "torch_dist", ConvertOptions(layout=layout)))
    report = diff(source, open_model(tmp_path / "mcore"))
    assert report.same, report
    assert report.equal == len(source.tensors)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(fault: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    model, edit, parameter, cause = FAULTS[fault]
    broken = open_model(edited(tiny_folder(model), tmp_path / "broken", edit))
    report = diff(open_model(tiny_folder(model)), broken)
    assert not report.same
    assert {True} == {"linear_" in d.name for d in report.differences}
    assert any(parameter in d.name and cause in d.cause for d in report.differences), report.differences
    assert len(report.differences) <= 2


@pytest.mark.parametrize("narrow", ["A", "B"])
def test_the_narrower_side_is_the_rounded_one(narrow: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    """A norm of ones is the same numbers in both dtypes: not even there was fp32 rounded from bf16."""

    def ones(held: dict[str, Tensor]) -> None:
        held["model.norm.weight"].fill_(1.0)

    def halve(held: dict[str, Tensor]) -> None:
        held.update({name: tensor.bfloat16() for name, tensor in held.items()})

    folder = edited(tiny_folder("llama"), tmp_path / "whole", ones)
    whole, halved = open_model(folder), open_model(edited(folder, tmp_path / "halved", halve))
    report = diff(halved, whole) if narrow == "A" else diff(whole, halved)
    wide = "B" if narrow == "A" else "A"
    assert {d.cause for d in report.differences} == {f"float32 in {wide}, rounded to bfloat16 in {narrow}"}
    assert len(report.differences) == len(whole.tensors)


def test_another_model_is_told_by_names_and_config(tiny_folder: TinyFolders) -> None:
    report = diff(open_model(tiny_folder("llama")), open_model(tiny_folder("qwen2")))
    assert any("add_qkv_bias" in field for field in report.config)
    assert all("linear_qkv.bias" in name for name in report.only_b)
    assert report.only_b
    assert torch.isfinite(torch.tensor([d.max_abs for d in report.differences if d.max_abs is not None])).all()
