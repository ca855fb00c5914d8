"""Legacy files that are broken, hostile or not of one run: refused with the file's name, and nothing written."""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.model import open_model
from tests.conftest import TinyFolders
from tests.converters.test_legacy import assert_same, back, weights, write
from tests.converters.test_legacy_faults import edit, edit_all

State = dict[str, Any]
QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
NORM = "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
FILE = "model_optim_rng.pt"


@pytest.fixture(scope="module")
def pristine(tiny_folder: TinyFolders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama with tp 2 and pp 2."""
    return write(tiny_folder("llama"), tmp_path_factory.mktemp("legacy") / "torch", tp=2, pp=2)


@pytest.fixture
def made(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "torch"))


def set_item(*path: Any, to: Any) -> Callable[[State], None]:
    def change(state: State) -> None:
        held: Any = state
        for step in path[:-1]:
            held = held[step]
        if isinstance(held, argparse.Namespace):
            setattr(held, path[-1], to)
        else:
            held[path[-1]] = to

    return change


def drop_layer(number: int) -> Callable[[State], None]:
    def change(state: State) -> None:
        for key in [key for key in state["model"] if key.startswith(f"decoder.layers.{number}.")]:
            del state["model"][key]

    return change


def turned(state: State) -> None:
    state["model"][QKV] = state["model"][QKV].T.contiguous().T


def two_models(state: State) -> None:
    state["model0"] = state.pop("model")
    state["model2"] = state["model0"]


def no_model(state: State) -> None:
    del state["model"]


def deep(state: State) -> None:
    for _ in range(40):
        state["model"] = {"in": state["model"]}


RANK = "mp_rank_01_001"
BROKEN: dict[str, tuple[Callable[[State], None], str]] = {
    "another iteration": (set_item("iteration", to=5), r"iteration is 5, but 0 in"),
    "another version": (set_item("checkpoint_version", to=2.0), r"checkpoint_version is 2\.0, but 3\.0"),
    "other arguments": (set_item("args", "num_layers", to=5), r"args\.num_layers is 5, but 4"),
    "no arguments": (set_item("args", to=None), r"args\.num_layers is None, but 4"),
    "a layer too few": (drop_layer(1), r"holds 1 layers, but .*mp_rank_00_001.*, 2"),
    "a hole": (drop_layer(0), r"holds 1 layers, but .*, 2|layer 0 of its 2 is missing"),
    "a strange tensor": (set_item("model", "decoder.layers.0.mlp.extra.weight", to=torch.zeros(2)), r"1 unexpected"),
    "another shape": (
        set_item("model", QKV, to=torch.zeros(3, 64)),
        rf"{RANK}:{QKV}: expected shape \[64, 64\].*\[3, 64\]",
    ),
    "a shape of a replica": (set_item("model", NORM, to=torch.zeros(65)), r"expected shape \[64\].*found \[65\]"),
    "another dtype": (
        set_item("model", QKV, to=torch.zeros(64, 64).half()),
        r"is torch\.float16, but torch\.float32 in mp_rank_00",
    ),
    "a missing slice": (lambda state: state["model"].pop(QKV), r"1 missing: .*layers\.2\..*not in mp_rank_01_001"),
    "columns before rows": (turned, r"not contiguous"),
    "no model": (no_model, r"holds no model; its keys are args"),
    "models 0 and 2": (two_models, r"numbered \[0, 2\]"),
    "a model that is a list": (set_item("model", to=[torch.zeros(2)]), r"its model is list"),
    "numbers for names": (set_item("model", 7, to=torch.zeros(2)), r"has a key 7"),
    "too deep": (deep, r"nested more than"),
    "chunks on one rank": (
        lambda s: s.update(model0=s["model"], model1=s.pop("model")),
        r"different numbers of model chunks",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_rank_that_is_not_of_the_run_is_refused(made: Path, name: str) -> None:
    change, message = BROKEN[name]
    edit(made, RANK, change)
    with pytest.raises(BadInputError, match=message) as refused:
        open_model(made)
    assert RANK in str(refused.value)


EVERYWHERE: dict[str, tuple[Callable[[State], None], str]] = {
    "fewer layers than the args say": (drop_layer(1), r"hold 2 layers, the config has 4"),
    "a hole in every stage": (drop_layer(0), r"layer 0 of its 2 is missing"),
    "more stages": (set_item("args", "pipeline_model_parallel_size", to=3), r"2 ranks are missing: mp_rank_00_002/"),
    "fewer slices": (
        set_item("args", "tensor_model_parallel_size", to=1),
        r"args say tp is 1, but there are files of 2",
    ),
    "both in one number": (set_item("args", "expert_model_parallel_size", to=2), r"pipeline size 2 and expert size 2"),
    "a million stages": (
        set_item("args", "pipeline_model_parallel_size", to=10**9),
        r"no run is so large|tp 2, pp 1000000000",
    ),
    "experts cut more": (set_item("args", "expert_tensor_parallel_size", to=4), r"experts are cut in 4"),
}


@pytest.mark.parametrize("name", EVERYWHERE)
def test_arguments_that_the_files_contradict_are_refused(made: Path, name: str) -> None:
    change, message = EVERYWHERE[name]
    edit_all(made, change)
    with pytest.raises(BadInputError, match=message):
        open_model(made)


def test_every_truncation_is_refused(made: Path) -> None:
    file = made / "release" / RANK / FILE
    whole = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        marks = {entry.header_offset for entry in archive.infolist()} | {archive.start_dir, len(whole) - 22}
    for mark in sorted({at + by for at in marks for by in (-1, 0, 1) if 0 <= at + by < len(whole)}):
        file.write_bytes(whole[:mark])
        with pytest.raises(BadInputError, match=RANK):
            open_model(made)


class Hostile:
    """Asks for a shell when it is loaded by an ordinary unpickler."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def test_a_hostile_pickle_is_not_run(made: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    file = made / "release" / RANK / FILE
    for value in ({"model": {}, "args": Hostile(mark)}, {"model": {QKV: Hostile(mark)}}, Hostile(mark)):
        torch.save(value, file)
        with pytest.raises(NotSupportedError, match=r"(posix|os)\.system"):
            open_model(made)
    assert not mark.exists()
    torch.load(file, weights_only=False)
    assert mark.exists(), "the pickle is harmless, so the test shows nothing"


def test_files_from_before_zip_are_refused_with_advice(made: Path) -> None:
    file = made / "release" / RANK / FILE
    torch.save(torch.load(file, weights_only=False), file, _use_new_zipfile_serialization=False)
    with pytest.raises(NotSupportedError, match=rf"{RANK}.*before torch 1\.6.*save it again"):
        open_model(made)
    file.write_bytes(pickle.dumps({"model": {}}))
    with pytest.raises(BadInputError, match="no zip archive"):
        open_model(made)


def test_names_that_fit_no_rank_are_refused(made: Path) -> None:
    release = made / "release"
    for name, message in (("mp_rank_0", "expected a folder mp_rank_TT"), ("mp_rank_00_00x", "expected a folder")):
        (release / name).mkdir()
        with pytest.raises(BadInputError, match=message):
            open_model(made)
        (release / name).rmdir()
    shutil.copytree(release / "mp_rank_00_000", release / "mp_rank_000_000")
    with pytest.raises(BadInputError, match="same rank"):
        open_model(made)
    (release / "mp_rank_000_000").rename(release / "mp_rank_00")
    with pytest.raises(BadInputError, match="different numbers of parts"):
        open_model(made)


def test_views_of_one_storage_are_read(made: Path, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    """torch.save keeps a storage once, however many tensors look into it: Megatron's parameters may be views."""

    def one_storage(state: State) -> None:
        names = [key for key, value in state["model"].items() if value is not None]
        flat = torch.cat([torch.ones(5), *(state["model"][name].reshape(-1) for name in names)])
        at = 5
        for name in names:
            old = state["model"][name]
            state["model"][name] = flat[at : at + old.numel()].view(old.shape)
            at += old.numel()

    edit_all(made, one_storage)
    with zipfile.ZipFile(made / "release" / RANK / FILE) as archive:
        assert sum("/data/" in name for name in archive.namelist()) == 1
    assert_same(weights(tiny_folder("llama")), back(made, tmp_path / "hf"))


def test_an_expert_beyond_the_rank_is_unexpected(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    folder = write(tiny_folder("mixtral"), tmp_path / "torch", ep=2)
    key = "decoder.layers.0.mlp.experts.linear_fc2.weight"
    edit(folder, "mp_rank_00_001", lambda state: state["model"].update({f"{key}2": state["model"][f"{key}1"]}))
    with pytest.raises(BadInputError, match=r"1 unexpected: .*mp_rank_00_001:.*linear_fc2\.weight2"):
        open_model(folder)


def test_grouped_experts_that_do_not_split_are_unexpected(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    folder = write(tiny_folder("mixtral"), tmp_path / "torch")
    key = "decoder.layers.0.mlp.experts.weight1"
    for odd in (torch.zeros(2), torch.zeros(64, 4 * 192 + 1)):
        edit(folder, "mp_rank_00", set_item("model", key, to=odd))
        with pytest.raises(BadInputError, match=r"1 unexpected: .*layers\.0\.mlp\.experts\.weight1"):
            open_model(folder)
