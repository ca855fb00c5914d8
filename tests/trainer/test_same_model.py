"""A run is resumed with the model that it began with, or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ckptbridge.converters.errors import BadInputError
from ckptbridge.trainer.recipe import ModelSection
from ckptbridge.trainer.recipe_file import load_recipe
from ckptbridge.trainer.same_model import describe_model, describe_upcycling, refuse_other_model
from ckptbridge.trainer.source import open_source
from tests.trainer.tiny_runs import contents, recipe_values, run, save_model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and a finished run of `llama`."""
    place = tmp_path_factory.mktemp("same")
    for name in ("llama", "mixtral"):
        save_model(place, name)
    run(recipe_values(place, "llama", "finished"))
    return place


def changed(place: Path, name: str, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of the model whose config.json says something else."""
    if not (place / name).exists():
        shutil.copytree(place / "llama", place / name)
        config = json.loads((place / name / "config.json").read_text())
        change(config)
        (place / name / "config.json").write_text(json.dumps(config))
    return place / name


def other_base(config: dict[str, Any]) -> None:
    config["rope_parameters"] |= {"rope_theta": 123.0}


def other_weights(place: Path) -> Path:
    if not (place / "other weights").exists():
        shutil.copytree(place / "llama", place / "other weights")
        file = place / "other weights" / "model.safetensors"
        save_file({name: tensor + 0.01 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return place / "other weights"


def refused(place: Path, run_folder: str, *overrides: str, model: str = "llama") -> str:
    """What is said, after a look that nothing of the run was touched."""
    before = contents(place / run_folder)
    with pytest.raises(BadInputError) as error:
        run(recipe_values(place, model, run_folder), *overrides)
    assert contents(place / run_folder) == before
    return str(error.value)


CHANGES: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "what is computed": (
        lambda place: changed(place, "other base", other_base),
        ("rotary_base was 10000.0, now it is 123.0", "config.json: rope_parameters.rope_theta was 10000.0"),
    ),
    "what is exported": (
        lambda place: changed(place, "other end", lambda config: config.update(eos_token_id=7)),
        ("config.json: eos_token_id was 2, now it is 7",),
    ),
    "weights": (other_weights, ("a digest of model.init_from's weights was ['", "now it is ['")),
    "another family": (
        lambda place: place / "mixtral",
        ("family was 'llama', now it is 'mixtral'", "num_moe_experts was None, now it is 4"),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("steps", [4, 6])
def test_another_model_is_refused_by_field_and_nothing_is_touched(steps: int, change: str, place: Path) -> None:
    """Of a run that is done, too: it would end at once, with the old model's weights."""
    make, lines = CHANGES[change]
    said = refused(place, "finished", f"model.init_from={make(place)}", f"schedule.total_steps={steps}")
    assert str(place / "finished" / "checkpoints" / "iter_0000004") in said
    for line in (*lines, "restore the recipe's model section, or start in another run_folder"):
        assert line in said
    if change == "what is exported":
        assert len(said.splitlines()) == 3


def test_a_model_that_moved_and_other_training_are_allowed(place: Path) -> None:
    shutil.copytree(place / "llama", place / "moved" / "deeper")
    shutil.copytree(place / "finished", place / "resumed")
    config = json.loads((place / "moved" / "deeper" / "config.json").read_text())
    config |= {"transformers_version": "9.9", "_name_or_path": "elsewhere"}
    (place / "moved" / "deeper" / "config.json").write_text(json.dumps(config))
    result = run(
        recipe_values(place, "moved/deeper", "resumed"),
        *("schedule.total_steps=6", "schedule.min_lr=1e-4", "optimizer.lr=1e-3", "optimizer.weight_decay=0"),
        *("data.micro_batch_size=1", "data.global_batch_size=3", "evaluation.every=1", "checkpoint.save_every=1"),
        *("kernels.backend=reference", "memory.recompute=full", "precision=bf16", "export.hf=true", "seed=5"),
    )
    assert (result.resumed_from, result.steps) == (4, 6)
    assert load_recipe(place / "resumed" / "recipe.yaml").optimizer.lr == 1e-3


def test_recipe_yaml_is_of_a_run_that_was_accepted(place: Path) -> None:
    """Whatever refuses it: the data here."""
    before = (place / "finished" / "recipe.yaml").read_bytes()
    with pytest.raises(BadInputError, match=r"data\.sequence_length was 16, now it is 8"):
        run(recipe_values(place, "llama", "finished"), "data.sequence_length=8", "schedule.total_steps=9")
    assert (place / "finished" / "recipe.yaml").read_bytes() == before


def test_upcycling_is_compared_before_anything_is_made(place: Path) -> None:
    upcycle = {"num_experts": 4, "topk": 2, "method": "split", "distill": {"tokens": 200}}
    values = recipe_values(place, "llama", "mixture")
    values["model"]["upcycle"] = upcycle
    run(values)
    assert run(values, "schedule.total_steps=5").resumed_from == 4
    for override, line in (
        ("model.upcycle.topk=3", "model.upcycle.topk was 2, now it is 3"),
        ("model.upcycle.distill.tokens=300", "model.upcycle.distill.tokens was 200, now it is 300"),
        ("model.upcycle=null", "model.upcycle was {"),
    ):
        before = contents(place / "mixture")
        with pytest.raises(BadInputError) as error:
            run(values, override, "schedule.total_steps=6")
        assert line in str(error.value)
        assert contents(place / "mixture") == before


def test_texts_of_the_upcycling_may_move_but_not_change(tmp_path: Path) -> None:
    def described(name: str) -> dict[str, Any]:
        upcycle = {"num_experts": 4, "method": "cmoe", "calibrate": str(tmp_path / name)}
        return describe_upcycling(ModelSection.model_validate({"init_from": "x", "upcycle": upcycle}))

    for name, text in (("here", "a text"), ("there", "a text"), ("other", "another")):
        (tmp_path / name).write_text(text)
    refuse_other_model(described("here"), described("there"), tmp_path)
    with pytest.raises(BadInputError, match=r"model\.upcycle\.calibrate was 'text [0-9a-f]{16}', now it is 'text"):
        refuse_other_model(described("here"), described("other"), tmp_path)
    refuse_other_model({}, described("other"), tmp_path)  # a checkpoint that says nothing of its model


def test_a_run_that_begins_anew_replaces_the_old_config(place: Path) -> None:
    """Where every checkpoint was deleted, config.json beside them is still that of the model before."""
    values = recipe_values(place, "llama", "anew")
    run(values)
    for folder in (place / "anew" / "checkpoints").glob("iter_*"):
        shutil.rmtree(folder)
    moved = f"model.init_from={changed(place, 'other base', other_base)}"
    assert run(values, moved).resumed_from == 0
    assert run(values, moved, "schedule.total_steps=6").resumed_from == 4
    config = json.loads((place / "anew" / "checkpoints" / "hf" / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == 123.0


def test_fields_that_one_version_does_not_know_are_no_difference(place: Path) -> None:
    """Of what this program makes itself; a config.json that came with the model counts whole."""
    values = recipe_values(place, "llama", "x")
    values["model"]["upcycle"] = {"num_experts": 4}
    section = ModelSection.model_validate(values["model"])
    now = describe_model(open_source(section, place / "x"), section)
    was = json.loads(json.dumps(now))
    for part in ("model.upcycle", "decoder", "the made config.json"):
        was[part] |= {"gone": 1}
        del was[part][sorted(now[part])[0]]
    refuse_other_model(was, now, place)
    was["decoder"]["hidden_size"] = was["the made config.json"]["hidden_size"] = 8
    with pytest.raises(BadInputError) as error:
        refuse_other_model(was, now, place)
    assert "  hidden_size was 8, now it is 64\n  the made config.json: hidden_size was 8, now" in str(error.value)
    config = {"config.json": {"rope_theta": 1.0}}
    with pytest.raises(BadInputError, match=r"config\.json: more was 'absent', now it is 2"):
        refuse_other_model(config, {"config.json": {"rope_theta": 1.0, "more": 2}}, place)
