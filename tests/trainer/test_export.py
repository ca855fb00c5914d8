"""An export that could not be written is refused before the first step."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from ckptbridge.converters.errors import BadInputError, NotSupportedError
from tests.trainer.tiny_runs import contents, recipe_values, run, save_model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("export")
    for name in ("llama", "nemotron"):
        save_model(place, name)
    return place


def refused(values: dict[str, Any], kind: type[BadInputError] = BadInputError) -> str:
    with pytest.raises(kind) as error:
        run(values, "export.hf=true", on_step=lambda record: pytest.fail(f"took {record}"))
    return str(error.value)


def test_a_model_without_a_hugging_face_class_needs_no_export(place: Path) -> None:
    values = recipe_values(place, "nemotron", "no class")
    values["model"]["upcycle"] = {"num_experts": 2, "topk": 2}
    said = refused(values, NotSupportedError)
    assert said.startswith("export.hf: ")
    assert "has no Hugging Face class" in said
    assert said.endswith("set export.hf=false: the run's checkpoints are for Megatron")
    assert not (place / "no class" / "train.jsonl").exists()
    assert run(values).steps == 4
    assert "has no Hugging Face class" in refused(values, NotSupportedError)


def test_what_is_no_checkpoint_is_not_replaced(place: Path) -> None:
    values, hf = recipe_values(place, "llama", "in the way"), place / "in the way" / "hf"
    hf.mkdir(parents=True)
    (hf / "notes.txt").write_text("mine")
    said = refused(values)
    assert f"export.hf: {hf} is no checkpoint, so the export would not replace it; move it away, or set" in said
    assert (hf / "notes.txt").read_text() == "mine"
    shutil.rmtree(hf)
    hf.write_text("a file")
    assert f"export.hf: {hf} is no checkpoint" in refused(values)
    hf.unlink()
    hf.mkdir()
    run(values, "export.hf=true")
    assert (hf / "model.safetensors").exists()
    assert run(values, "export.hf=true", "schedule.total_steps=5").hf == hf, "an older export is replaced"


def test_the_model_that_a_run_starts_from_is_not_replaced(place: Path) -> None:
    source = place / "own" / "hf"
    shutil.copytree(place / "llama", source)
    before = contents(source)
    values = recipe_values(place, "own/hf", "own")
    said = refused(values)
    assert f"the export would replace {source}, which the run starts from; name another run_folder" in said
    assert run(values).steps == 4
    assert contents(source) == before


def test_work_that_is_no_export_is_left_alone(place: Path) -> None:
    partial = place / "partial" / "hf.partial"
    partial.mkdir(parents=True)
    (partial / "notes.txt").write_text("mine")
    values = recipe_values(place, "llama", "partial")
    assert f"export.hf: {partial} is in the way and no unfinished export; move it away" in refused(values)
    assert (partial / "notes.txt").read_text() == "mine"
