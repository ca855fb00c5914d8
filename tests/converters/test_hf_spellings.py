"""Hugging Face folders that are not as `save_pretrained` writes them today: stacked experts, pickled weights."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptbridge.converters.diff import diff
from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.model import open_model
from tests.conftest import TinyFolders
from tests.tiny import TINY, build_tiny

MIXTURES = [*(name for name, model in TINY.items() if model.is_moe), "minimax_m2", "phimoe"]


@pytest.mark.parametrize("name", MIXTURES)
def test_stacked_experts_are_the_same_model(name: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    """The state dict as transformers holds it, saved as it is."""
    state = {key: tensor.contiguous() for key, tensor in build_tiny(name).state_dict().items()}
    assert any(key.endswith("experts.gate_up_proj") for key in state)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copy(tiny_folder(name) / "config.json", tmp_path)
    report = diff(open_model(tiny_folder(name)), open_model(tmp_path))
    assert report.same, report

    broken = next(key for key in state if key.endswith("experts.gate_up_proj"))
    state[broken] = torch.cat(state[broken].chunk(2, 1)[::-1], 1).contiguous()
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    causes = {d.cause for d in diff(open_model(tiny_folder(name)), open_model(tmp_path)).differences}
    assert causes == {"gate_proj and up_proj swapped"}

    state[broken] = state[broken][:-1].clone()
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInputError, match=broken):
        open_model(tmp_path)


def pickled(source: Path, target: Path, shards: int) -> Path:
    """The folder with its weights as torch.save files."""
    target.mkdir()
    shutil.copy(source / "config.json", target)
    held = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    if shards == 1:
        torch.save(held, target / "pytorch_model.bin")
        return target
    names = [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)]
    weight_map = {tensor: names[i % shards] for i, tensor in enumerate(held)}
    for name in names:
        torch.save({tensor: held[tensor] for tensor in held if weight_map[tensor] == name}, target / name)
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return target


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", ["llama_tied", "qwen2", "mixtral"])
def test_pickled_weights_are_the_same_model(name: str, shards: int, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    folder = pickled(tiny_folder(name), tmp_path / "pickled", shards)
    assert diff(open_model(tiny_folder(name)), open_model(folder)).same


def test_a_pickle_that_wants_to_run_something_is_refused(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    class Gadget:
        def __reduce__(self) -> object:
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = pickled(tiny_folder("llama"), tmp_path / "pickled", 1)
    torch.save({"lm_head.weight": Gadget()}, folder / "pytorch_model.bin")
    with pytest.raises(NotSupportedError, match="mkdir"):
        open_model(folder)
    assert not (tmp_path / "ran").exists()
    torch.save([1, 2], folder / "pytorch_model.bin")
    with pytest.raises(BadInputError, match=r"pytorch_model\.bin"):
        open_model(folder)
