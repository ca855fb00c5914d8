"""What a run finds when it is started again: lines and folders that are gone, left over or damaged."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptbridge.converters.errors import BadInputError
from ckptbridge.trainer.checkpoint import complete_checkpoints
from ckptbridge.trainer.log import read_log
from tests.trainer.tiny_runs import recipe_values, run, save_model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps, to be copied."""
    place = tmp_path_factory.mktemp("resuming")
    save_model(place, "llama_tied")
    run(recipe_values(place, "llama_tied", "finished"))
    return place


@pytest.fixture
def values(place: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    """The recipe of a copy of the finished run."""
    name = request.node.name.replace("/", " ")
    shutil.copytree(place / "finished", place / name)
    return recipe_values(place, "llama_tied", name)


def test_a_log_that_is_gone_stops_nothing(values: dict[str, Any]) -> None:
    log = Path(values["run_folder"]) / "train.jsonl"
    log.unlink()
    result = run(values)
    assert (result.steps, result.resumed_from, result.held_out_before, result.held_out_after) == (4, 4, None, None)
    assert run(values, "schedule.total_steps=5").held_out_before is None
    assert [record["step"] for record in read_log(log)] == [5]


def test_tokens_are_counted_as_they_were_taken(values: dict[str, Any]) -> None:
    result = run(values, "data.global_batch_size=6", "schedule.total_steps=6")
    tokens = [record["tokens"] for record in read_log(result.log)[1:]]
    assert tokens == [64, 128, 192, 256, 256 + 96, 256 + 192]


def test_what_killed_runs_left_is_removed(values: dict[str, Any]) -> None:
    root = Path(values["run_folder"]) / "checkpoints"
    for name in ("iter_0000001.partial", "iter_0000009.partial"):
        shutil.copytree(root / "iter_0000002", root / name)
    with pytest.raises(BadInputError):
        run(values, "data.seed=9")
    assert len(list(root.glob("iter_*.partial"))) == 2, "a run that is refused removes nothing"
    run(values)
    assert sorted(path.name for path in root.iterdir() if path.is_dir()) == ["hf", "iter_0000002", "iter_0000004"]


@pytest.mark.parametrize("damage", ["truncated", "missing", "spoiled"])
def test_a_damaged_checkpoint_is_named_with_what_to_do(damage: str, values: dict[str, Any]) -> None:
    root = Path(values["run_folder"]) / "checkpoints"
    newest = root / "iter_0000004"
    file = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-5000])
    elif damage == "missing":
        (newest / ".metadata").unlink()
    else:
        file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(BadInputError) as error:
        run(values, "schedule.total_steps=6")
    assert (
        f"if the newest checkpoint, {newest}, is damaged, delete it: the run then continues from iter_0000002"
        in str(error.value)
    )
    assert complete_checkpoints(root) == [root / "iter_0000002", newest]
    shutil.rmtree(newest)
    result = run(values, "schedule.total_steps=6")
    assert (result.resumed_from, result.steps) == (2, 6)
    for folder in complete_checkpoints(root)[:-1]:
        shutil.rmtree(folder)
    (root / "iter_0000006" / ".metadata").unlink()
    with pytest.raises(BadInputError, match=r"iter_0000006, is damaged, delete it: the run then begins anew"):
        run(values)


def test_too_little_memory_of_a_gpu_is_the_users_to_change(values: dict[str, Any]) -> None:
    """PyTorch's error as it comes from the allocator, wherever in a step."""

    def exhausted(record: dict[str, Any]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity ...")

    with pytest.raises(BadInputError) as error:
        run(values, "schedule.total_steps=6", on_step=exhausted)
    assert str(error.value) == (
        "the GPU has too little memory for this run: CUDA out of memory. Tried to allocate 2.00 GiB.\nlower "
        "data.micro_batch_size, or set memory.recompute, memory.offload or optimizer.moments=bf16; the run then "
        "continues from its newest checkpoint"
    )
    assert run(values, "schedule.total_steps=6").resumed_from == 4
