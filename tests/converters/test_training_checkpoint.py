"""Checkpoints of a run: bit for bit there and back, Megatron's keys, and never half a step as the newest."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.errors import BadInputError, StorageError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import Model, decoder_tensors, expert_tensors, open_model
from ckptbridge.converters.training_checkpoint import (
    OPTIMIZER_STATES,
    TrainingCheckpoint,
    load_training_checkpoint,
    save_training_checkpoint,
)
from tests.conftest import TinyFolders
from tests.tiny import TINY

COMMON: dict[str, Any] = {
    "opt_param_scheduler": {"max_lr": 1e-3, "num_steps": 7},
    "data": {"epoch": 0, "offset": [1, 2, 3], "seed": 2**40},
    "rng": [0.25, None, True, "text"],
    "consumed_samples": 1234,
}
TRACKER = "latest_checkpointed_iteration.txt"


def state_of(model: Model, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random tensors under the decoder's names."""
    generator = torch.Generator().manual_seed(seed)
    names = decoder_tensors(model.tensors, model.config)
    return {name: torch.randn(lazy.shape, generator=generator).to(dtype) for name, lazy in names.items()}


def save(root: Path, model: Model, iteration: int, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "weights": state_of(model, iteration, dtype),
        "optimizer": {name: state_of(model, 100 * i + iteration) for i, name in enumerate(OPTIMIZER_STATES, 1)},
        "common": COMMON,
    } | changes
    return save_training_checkpoint(root, model=model, iteration=iteration, **values)


def assert_holds(loaded: TrainingCheckpoint, model: Model, iteration: int, dtype: torch.dtype = torch.float32) -> None:
    """Every weight and moment is the one that `save` made for this iteration, bit for bit."""
    assert loaded.iteration == loaded.model.iteration == iteration
    assert loaded.common == COMMON
    assert loaded.model.config == model.config
    found = {"": decoder_tensors(loaded.model.tensors, loaded.model.config), **loaded.optimizer}
    expected = {"": state_of(model, iteration, dtype)} | {
        name: state_of(model, 100 * i + iteration) for i, name in enumerate(OPTIMIZER_STATES, 1)
    }
    assert found.keys() == expected.keys()
    for kind, tensors in expected.items():
        assert found[kind].keys() == tensors.keys()
        for name, tensor in tensors.items():
            back = found[kind][name].read()
            assert back.dtype == tensor.dtype
            assert torch.equal(back, tensor), f"{kind} {name}"


@pytest.mark.parametrize("name", TINY)
def test_a_step_comes_back_bit_for_bit(name: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    model, root = open_model(tiny_folder(name)), tmp_path / "run"
    folder = save(root, model, 7)
    assert folder == root / "iter_0000007"
    assert (root / TRACKER).read_text().strip() == "7"
    for place in (root, folder):
        assert_holds(load_training_checkpoint(place), model, 7)


def test_weights_may_be_narrower_than_the_optimizer(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    model = open_model(tiny_folder("mixtral"))
    folder = save(tmp_path, model, 3, dtype=torch.bfloat16)
    assert_holds(load_training_checkpoint(folder), model, 3, torch.bfloat16)
    assert open_model(tmp_path).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["llama_tied", "qwen2_moe", "qwen3_moe_dense_first"])
def test_the_keys_are_megatrons(name: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    model = open_model(tiny_folder(name))
    folder = save(tmp_path / "run", model, 1)
    execute(plan_conversion(model, tmp_path / "weights", "torch_dist"))
    plain = _tensors(tmp_path / "weights" / "release")
    found = _tensors(folder)
    expected = dict(plain)
    for state in ("param", "exp_avg", "exp_avg_sq"):
        expected |= {f"optimizer.state.{state}.{key}": shape for key, shape in plain.items()}
    assert found == expected
    if name == "llama_tied":
        assert found["optimizer.state.exp_avg.decoder.layers.self_attention.linear_qkv.weight"] == (4, 128, 64)
        assert "optimizer.state.exp_avg.output_layer.weight" not in found
    if name == "qwen2_moe":
        assert found["optimizer.state.exp_avg_sq.decoder.layers.mlp.experts.experts.linear_fc1.weight"] == (
            4,
            8,
            96,
            64,
        )
    if name == "qwen3_moe_dense_first":
        assert found["optimizer.state.param.decoder.layers.0.mlp.linear_fc1.weight"] == (192, 64)
    chunks = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    for key, entry in chunks.items():
        if key.startswith("optimizer.") and isinstance(entry, TensorStorageMetadata):
            twin = chunks[key.split(".", 3)[3]]
            assert isinstance(twin, TensorStorageMetadata)
            assert entry.chunks == twin.chunks  # cut like the weight it belongs to
            assert entry.properties.dtype == torch.float32


def _tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {key: tuple(e.size) for key, e in entries.items() if isinstance(e, TensorStorageMetadata)}


@pytest.mark.parametrize("name", ["llama", "qwen2_moe_sparse", "qwen3_moe"])
def test_a_step_becomes_a_hugging_face_model(name: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    """With the trained weights, not those that the run began with, and with the source's config and tokenizer."""
    model, root = open_model(tiny_folder(name)), tmp_path / "run"
    trained = {key: lazy.read() + 1 for key, lazy in decoder_tensors(model.tensors, model.config).items()}
    save(root, model, 12, weights=trained)
    for place in (root, root / "iter_0000012"):
        target = tmp_path / f"hf_{place.name}"
        execute(plan_conversion(open_model(place), target, "hf", ConvertOptions(workers=1)))
        held = {k: v for file in target.glob("*.safetensors") for k, v in load_file(file).items()}
        original = {k: v for file in tiny_folder(name).glob("*.safetensors") for k, v in load_file(file).items()}
        assert held.keys() == original.keys()
        assert all(torch.equal(held[key], original[key] + 1) for key in held)
        for file in ("config.json", "generation_config.json"):
            assert (target / file).read_bytes() == (tiny_folder(name) / file).read_bytes()


def test_a_run_without_optimizer_or_common_is_read(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    model = open_model(tiny_folder("llama"))
    loaded = load_training_checkpoint(save(tmp_path, model, 2, optimizer={}, common={}))
    assert (loaded.optimizer, loaded.common, loaded.iteration) == ({}, {}, 2)
    partly = load_training_checkpoint(save(tmp_path, model, 4, optimizer={"exp_avg": state_of(model, 1)}))
    assert list(partly.optimizer) == ["exp_avg"]


def test_the_newest_step_is_the_trackers(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    model = open_model(tiny_folder("llama"))
    for iteration in (5, 10, 8):
        save(tmp_path, model, iteration)
    assert load_training_checkpoint(tmp_path).iteration == 8
    assert_holds(load_training_checkpoint(tmp_path / "iter_0000010"), model, 10)
    save(tmp_path, model, 8, weights=state_of(model, 99))  # again, over what is there
    again = load_training_checkpoint(tmp_path)
    first = next(iter(state_of(model, 99).items()))
    assert torch.equal(decoder_tensors(again.model.tensors, model.config)[first[0]].read(), first[1])


def test_stacking_experts_and_taking_them_apart_are_inverse(tiny_folder: TinyFolders) -> None:
    for name in ("mixtral", "qwen2_moe_sparse"):
        model = open_model(tiny_folder(name))
        stacked = decoder_tensors(model.tensors, model.config)
        assert (
            stacked["decoder.layers.1.mlp.experts.experts.linear_fc1.weight"].shape[0] == model.config.num_moe_experts
        )
        apart = expert_tensors(stacked, model.family, model.config)
        assert apart.keys() == model.tensors.keys()
        for key, lazy in apart.items():
            assert torch.equal(lazy.read(), model.tensors[key].read())
            assert torch.equal(lazy.read_rows(1, lazy.shape[0]), model.tensors[key].read()[1:])


# ---- faults ---------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """Stands in for a signal."""


STEPS = ("fsync", "rename", "replace")


def _stop_at(step: int, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    """Raise in place of durable operation number `step`."""
    seen = 0

    def guard(operation: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == step + 1:
                raise error("stopped") if error is Stopped else OSError(28, "No space left on device")
            return operation(*arguments, **named)

        return call

    for name in STEPS:
        monkeypatch.setattr(os, name, guard(getattr(os, name)))


@pytest.mark.parametrize("error", [Stopped, OSError])
def test_a_save_that_is_stopped_anywhere_leaves_the_step_before_as_the_newest(
    error: type[BaseException], tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    model, root = open_model(tiny_folder("llama")), tmp_path / "run"
    save(root, model, 1)
    step, complete = 0, False
    while not complete:
        with pytest.MonkeyPatch.context() as patch:
            _stop_at(step, patch, error)
            try:
                save(root, model, 2)
                complete = True
            except (Stopped, StorageError) as stopped:
                assert isinstance(stopped, StorageError) == (error is OSError)  # noqa: PT017
        newest = load_training_checkpoint(root)
        if complete:
            assert_holds(newest, model, 2)
        else:
            assert newest.iteration == int((root / TRACKER).read_text())
            assert_holds(newest, model, newest.iteration)
            assert newest.iteration == 1 or step >= 8  # only the very last steps come behind the new tracker
        shutil.rmtree(root / "iter_0000002", ignore_errors=True)
        (root / TRACKER).write_text("1")
        step += 1
    assert step > 8
    assert not [path for path in root.iterdir() if path.name.endswith((".partial", ".tmp"))]


def test_a_save_over_the_same_step_that_is_stopped_keeps_one_of_the_two(
    tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    model, root, step = open_model(tiny_folder("llama")), tmp_path / "run", 0
    while True:
        shutil.rmtree(root, ignore_errors=True)
        save(root, model, 1)
        with pytest.MonkeyPatch.context() as patch:
            _stop_at(step, patch, Stopped)
            try:
                save(root, model, 1)
                break
            except Stopped:
                pass
        assert_holds(load_training_checkpoint(root), model, 1)
        step += 1


def test_a_full_disk_is_a_storage_error_that_names_the_partial_folder(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    model, root = open_model(tiny_folder("llama")), tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        _stop_at(0, patch, OSError)
        with pytest.raises(StorageError, match=r"iter_0000003\.partial") as failed:
            save(root, model, 3)
    assert failed.value.exit_code == 4
    with pytest.raises(BadInputError):
        load_training_checkpoint(root)


def _lose(tensors: dict[str, Tensor]) -> None:
    tensors.pop("decoder.layers.1.mlp.linear_fc2.weight")


def _add(tensors: dict[str, Tensor]) -> None:
    tensors["decoder.layers.9.mlp.linear_fc2.weight"] = torch.zeros(3)


def _widen(tensors: dict[str, Tensor]) -> None:
    tensors["decoder.layers.1.mlp.linear_fc2.weight"] = torch.zeros(64, 97)


@pytest.mark.parametrize("where", ["weights", "exp_avg"])
@pytest.mark.parametrize(
    ("spoil", "word"), [(_lose, "layers.1."), (_add, "layers.9."), (_widen, "layers.1.")], ids=["lost", "extra", "wide"]
)
def test_tensors_that_do_not_fit_the_config_are_refused_before_output(
    spoil: Any, word: str, where: str, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    model = open_model(tiny_folder("llama"))
    spoiled = state_of(model, 1)
    spoil(spoiled)
    changes: dict[str, Any] = {"weights": spoiled} if where == "weights" else {"optimizer": {"exp_avg": spoiled}}
    with pytest.raises(BadInputError) as refused:
        save(tmp_path / "run", model, 1, **changes)
    assert word in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_names_that_the_checkpoint_owns_are_refused(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    model = open_model(tiny_folder("llama"))
    for clash in ("args", "iteration", "ckptbridge"):
        with pytest.raises(BadInputError, match=clash):
            save(tmp_path, model, 1, common={clash: 1})
    with pytest.raises(BadInputError, match="momentum"):
        save(tmp_path, model, 1, optimizer={"momentum": {}})
    with pytest.raises(BadInputError, match="missing"):
        save(tmp_path, model, 1, weights={})
    assert not any(tmp_path.iterdir())


def test_saved_steps_are_the_same_bytes_every_time(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    model = open_model(tiny_folder("mixtral"))
    first, second = save(tmp_path / "a", model, 4), save(tmp_path / "b", model, 4)
    for file in sorted(first.iterdir()):
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name


def test_the_config_of_the_run_lies_beside_its_steps(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    model = open_model(tiny_folder("qwen3"))
    save(tmp_path, model, 1)
    assert (tmp_path / "hf" / "config.json").read_bytes() == (tiny_folder("qwen3") / "config.json").read_bytes()
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == 2
