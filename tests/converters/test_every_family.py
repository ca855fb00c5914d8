"""Every family there and back: names against the class's own files, both Megatron formats, two layouts each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.execute import execute
from ckptbridge.converters.hf_folder import read_json
from ckptbridge.converters.model import open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from tests.conftest import TinyFolders
from tests.tiny import EVERY
from tests.tiny_families import FURTHER


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a Hugging Face folder."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            found |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("name", FURTHER)
def test_the_table_names_exactly_what_the_class_saves(name: str, tiny_folder: TinyFolders) -> None:
    saved = {key: tuple(tensor.shape) for key, tensor in tensors_of(tiny_folder(name)).items()}
    model = open_model(tiny_folder(name))
    made = {key: s for move in model.family.moves(model.config) for key, s in zip(move.hf, move.hf_shapes, strict=True)}
    made |= {copy: made[original] for copy, original in model.family.copied(model.config).items()}
    assert {key for key in made if key not in saved} == set()
    assert {key for key in saved if key not in made} == set()
    assert made == saved


@pytest.mark.parametrize("is_split", [False, True], ids=["one rank", "split"])
@pytest.mark.parametrize("to", ["torch_dist", "torch"])
@pytest.mark.parametrize("name", FURTHER)
def test_every_tensor_and_the_config_come_back(
    name: str, to: str, is_split: bool, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    source = tiny_folder(name)
    layout = ParallelLayout(tp=2, pp=2, ep=2 if EVERY[name].is_moe else 1) if is_split else ParallelLayout()
    execute(plan_conversion(open_model(source), tmp_path / "mcore", to, ConvertOptions(layout=layout)))  # type: ignore[arg-type]
    execute(plan_conversion(open_model(tmp_path / "mcore"), tmp_path / "back", "hf", ConvertOptions()))
    before, after = tensors_of(source), tensors_of(tmp_path / "back")
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype, key
        assert torch.equal(after[key].view(torch.uint8), tensor.view(torch.uint8)), key
    assert read_json(tmp_path / "back" / "config.json") == read_json(source / "config.json")


@pytest.mark.parametrize("name", FURTHER)
def test_a_megatron_checkpoint_without_config_is_understood_by_its_arguments(
    name: str, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    """Every field that changes the computation travels in the arguments, whatever Megatron can be told."""
    source = open_model(tiny_folder(name))
    execute(plan_conversion(source, tmp_path / "mcore", "torch_dist", ConvertOptions()))
    (tmp_path / "mcore" / "hf" / "config.json").unlink()
    found = open_model(tmp_path / "mcore")
    assert found.config == source.config
