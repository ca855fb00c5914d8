"""A plan from config.json and the index alone is the plan that the whole folder gives, or is refused like it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptbridge.converters.announced import Announced, is_announced_only, open_announced
from ckptbridge.converters.convert import ConversionPlan, ConvertOptions, plan_conversion
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.execute import execute, partial_folder
from ckptbridge.converters.hf_folder import INDEX
from ckptbridge.converters.hub.source import open_source
from ckptbridge.converters.model import open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from tests.conftest import TinyFolders

Announce = Callable[[str], Path]


@pytest.fixture
def announce(tiny_folder: TinyFolders, tmp_path: Path) -> Announce:
    """`announce(name)` is TINY[name] without its shards."""

    def made(name: str) -> Path:
        return shutil.copytree(
            tiny_folder(name), tmp_path / "announced", ignore=shutil.ignore_patterns("*.safetensors")
        )

    return made


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def planned(source: Path, target: Path) -> ConversionPlan:
    options = ConvertOptions(layout=ParallelLayout(tp=2), max_file_size=150_000)
    return plan_conversion(open_source(str(source), "plan"), target, "torch_dist", options)


@pytest.mark.parametrize("name", ["mixtral", "qwen2", "qwen2_moe", "qwen3_moe"])
def test_it_is_the_plan_of_the_whole_folder(
    name: str, announce: Announce, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    announced, whole = planned(announce(name), tmp_path / "out"), planned(tiny_folder(name), tmp_path / "out")
    a, b = announced.to_json(), whole.to_json()
    assert a.pop("source") != b.pop("source")
    assert a.pop("notes")[1:] == b.pop("notes")
    assert {key: a[key] for key in a if a[key] != b[key]} == {}
    assert dict(announced.small) == dict(whole.small)


def test_a_stack_of_experts_has_its_shape(announce: Announce, tmp_path: Path) -> None:
    folder = announce("mixtral")
    expected = planned(folder, tmp_path / "out").to_json()["files"]

    def stack(index: dict[str, Any]) -> None:
        names = {name: file for name, file in index["weight_map"].items() if ".experts." not in name}
        for layer in range(4):
            for part in ("gate_up_proj", "down_proj"):
                names[f"model.layers.{layer}.mlp.experts.{part}"] = "model-00001-of-00009.safetensors"
        index["weight_map"] = {name.replace("block_sparse_moe.gate", "mlp.gate"): names[name] for name in names}

    edit(folder / INDEX, stack)
    assert planned(folder, tmp_path / "out").to_json()["files"] == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index["weight_map"].pop("model.norm.weight"), ("1 missing", "model.norm.weight")),
        (
            lambda index: index["weight_map"].update({"model.layers.0.strange.weight": "a.safetensors"}),
            ("1 unexpected", "model.layers.0.strange.weight"),
        ),
        (lambda index: index["weight_map"].update({"model.norm.weight": "../a.safetensors"}), ("no file name",)),
        (lambda index: index.pop("weight_map"), ("weight_map is missing",)),
    ],
)
def test_names_are_refused_as_always(
    change: Callable[[dict[str, Any]], None], words: tuple[str, ...], announce: Announce, tmp_path: Path
) -> None:
    folder = announce("mixtral")
    edit(folder / INDEX, change)
    with pytest.raises(BadInputError) as refused:
        planned(folder, tmp_path / "out")
    assert all(word in str(refused.value) for word in words), refused.value


def test_a_total_size_that_the_shapes_contradict_is_told(announce: Announce, tmp_path: Path) -> None:
    folder = announce("mixtral")
    true = json.loads((folder / INDEX).read_text())["metadata"]["total_size"]
    assert not any("total_size" in note for note in planned(folder, tmp_path / "out").notes)
    edit(folder / INDEX, lambda index: index["metadata"].update(total_size=true // 2))
    told = [note for note in planned(folder, tmp_path / "out").notes if "total_size" in note]
    assert len(told) == 1
    assert f"total_size is {true // 2}" in told[0]
    assert str(true) in told[0]


def test_the_dtype_is_the_configs_or_the_plan_is_refused(announce: Announce, tmp_path: Path) -> None:
    folder = announce("mixtral")
    edit(folder / "config.json", lambda config: config.update(dtype=None, torch_dtype="bfloat16"))
    assert planned(folder, tmp_path / "out").source.dtype == torch.bfloat16
    edit(folder / "config.json", lambda config: config.pop("torch_dtype"))
    with pytest.raises(BadInputError, match="dtype"):
        planned(folder, tmp_path / "out")


def test_weights_in_fp8_are_announced_by_their_scales(announce: Announce, tmp_path: Path) -> None:
    folder = announce("mixtral")
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3", "activation_scheme": "dynamic"}
    edit(folder / "config.json", lambda config: config.update(quantization_config=fp8, dtype="bfloat16"))

    def add_scales(index: dict[str, Any]) -> None:
        index["weight_map"] |= {f"{n}_scale_inv": f for n, f in index["weight_map"].items() if "_proj." in n}

    edit(folder / INDEX, add_scales)
    tensors = open_announced(folder).tensors
    weight, scales = (tensors[f"model.layers.0.self_attn.q_proj.weight{end}"] for end in ("", "_scale_inv"))
    assert (weight.dtype, weight.shape) == (torch.float8_e4m3fn, (64, 64))
    assert (scales.dtype, scales.shape) == (torch.float32, (1, 1))
    assert tensors["model.norm.weight"].dtype == torch.bfloat16
    assert planned(folder, tmp_path / "out").nbytes > 0


def test_what_is_announced_cannot_be_read_or_converted(announce: Announce, tmp_path: Path) -> None:
    folder = announce("mixtral")
    assert is_announced_only(folder)
    plan = planned(folder, tmp_path / "out")
    with pytest.raises(BadInputError, match="only the index that names it was read"):
        execute(plan)
    assert not partial_folder(plan.target).exists()
    with pytest.raises(BadInputError, match="which is missing"):
        open_model(folder)
    with pytest.raises(BadInputError, match="only the index"):
        Announced(folder / "a.safetensors", (2, 2), torch.float32).read()


def test_a_folder_that_has_some_of_its_shards_is_broken(
    announce: Announce, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    folder = announce("mixtral")
    shutil.copy(tiny_folder("mixtral") / "model-00002-of-00009.safetensors", folder)
    assert not is_announced_only(folder)
    with pytest.raises(BadInputError, match="which is missing"):
        planned(folder, tmp_path / "out")
