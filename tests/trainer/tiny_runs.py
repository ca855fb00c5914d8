"""Runs of tiny models that take a second: for tests of what surrounds the steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ckptbridge.trainer.loop import TrainResult, train
from ckptbridge.trainer.recipe_file import parse_recipe, with_overrides
from tests.tiny import save_tiny
from tests.trainer.text import save_tokenizer, write_documents


def save_model(place: Path, name: str) -> Path:
    """Write the tiny model `name` with a tokenizer into place/name, and text into place/texts."""
    if not (place / "texts").exists():
        write_documents(place / "texts")
    save_tiny(name, place / name)
    save_tokenizer(place / name)
    return place / name


def recipe_values(place: Path, model: str, run_folder: str) -> dict[str, Any]:
    """Four steps with a checkpoint after each second one, all of which stay, and no export."""
    return {
        "run_folder": str(place / run_folder),
        "model": {"init_from": str(place / model)},
        "data": {
            "text": [str(place / "texts")],
            "sequence_length": 16,
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "held_out_fraction": 0.2,
        },
        "optimizer": {"lr": 3e-3},
        "schedule": {"total_steps": 4},
        "checkpoint": {"save_every": 2, "keep": 9},
        "export": {"hf": False},
        "evaluation": {"batches": 1},
        "device": "cpu",
        "threads": 1,
    }


def run(
    values: dict[str, Any], *overrides: str, on_step: Callable[[dict[str, Any]], None] | None = None
) -> TrainResult:
    """Train with some values changed, `section.key=value` each."""
    return train(parse_recipe(with_overrides(values, overrides)), on_step)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
