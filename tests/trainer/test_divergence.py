"""A run that diverges says so, and leaves what was good as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ckptbridge.converters.errors import BadInputError
from ckptbridge.trainer.checkpoint import complete_checkpoints
from ckptbridge.trainer.divergence import refuse_divergence
from ckptbridge.trainer.recipe_file import parse_recipe
from tests.trainer.test_log import refuse_constant
from tests.trainer.tiny_runs import contents, recipe_values, run, save_model

WILD = ("optimizer.lr=1e38", "optimizer.clip_grad=0", "schedule.total_steps=8", "checkpoint.keep=1")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("divergence")
    save_model(place, "mixtral")
    return place


def last_line(folder: Path) -> dict[str, object]:
    lines = (folder / "train.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse_constant) for line in lines][-1]


@pytest.mark.parametrize(
    ("lr", "lost", "loss_is_lost"),
    [("1e38", "loss is nan, grad_norm is nan", True), ("1e30", "grad_norm is nan", False)],
)
def test_a_run_without_numbers_ends_before_a_checkpoint_is_written(
    lr: str, lost: str, loss_is_lost: bool, place: Path
) -> None:
    values, folder = recipe_values(place, "mixtral", f"early {lr}"), place / f"early {lr}"
    with pytest.raises(BadInputError) as refused:
        run(values, *WILD, f"optimizer.lr={lr}", "export.hf=true")
    assert f"step 2: {lost}: the run diverged. No checkpoint was written. Lower optimizer.lr" in str(refused.value)
    assert "or set optimizer.clip_grad, and start again" in str(refused.value)
    line = last_line(folder)
    assert (line["step"], line["loss"] is None, line["grad_norm"]) == (2, loss_is_lost, None)
    assert not (folder / "hf").exists()
    assert complete_checkpoints(folder / "checkpoints") == []
    assert run(values).steps == 4


@pytest.mark.parametrize(
    ("save_every", "said"),
    [(2, "grad_norm is nan: the run diverged"), (1, "step 5: the run diverged, what it made of")],
)
def test_checkpoints_that_are_good_stay(save_every: int, said: str, place: Path) -> None:
    """With a checkpoint after every step the weights are already no model's, while the loss is still a number."""
    values = recipe_values(place, "mixtral", f"late {save_every}")
    run(values)
    root = place / f"late {save_every}" / "checkpoints"
    before = contents(root)
    with pytest.raises(BadInputError) as refused:
        run(values, *WILD, f"checkpoint.save_every={save_every}")
    assert said in str(refused.value)
    assert f"the newest checkpoint, {root / 'iter_0000004'}. Lower optimizer.lr" in str(refused.value)
    assert "or from iter_0000002 if you delete it" in str(refused.value)
    assert contents(root) == before
    assert run(values, "schedule.total_steps=5").resumed_from == 4


def test_held_out_loss_counts_too(place: Path) -> None:
    recipe = parse_recipe(recipe_values(place, "mixtral", "held out"))
    refuse_divergence({"step": 0, "held_out_loss": 4.0}, recipe)
    with pytest.raises(BadInputError, match=r"before the first step: held_out_loss is inf; nothing was trained"):
        refuse_divergence({"step": 0, "held_out_loss": float("inf")}, recipe)
    with pytest.raises(BadInputError, match=r"step 3: held_out_loss is nan: the run diverged"):
        refuse_divergence({"step": 3, "loss": 1.0, "grad_norm": 1.0, "held_out_loss": float("nan")}, recipe)


@pytest.mark.parametrize("command", [("ckptbridge.trainer",), ("ckptbridge", "train", "--json")])
def test_what_is_printed_is_json(command: tuple[str, ...], place: Path) -> None:
    name = f"printed {len(command)}"
    recipe = place / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump(recipe_values(place, "mixtral", name)))
    words = [sys.executable, "-m", *command, str(recipe), *(word for value in WILD for word in ("--set", value))]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 3
    assert "error: step 2: loss is nan, grad_norm is nan: the run diverged" in done.stderr
    for line in done.stdout.splitlines():
        json.loads(line, parse_constant=refuse_constant)
