"""Training runs of which only the log is wanted."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from ckptbridge.trainer.log import read_log
from ckptbridge.trainer.loop import LOG_NAME, train
from ckptbridge.trainer.recipe import Recipe


class _LastStepSeen(Exception):
    """Ends a run before its checkpoint, which is many times the model's size: nobody resumes it."""


def records_of(recipe: Recipe) -> list[dict[str, Any]]:
    """Train from the beginning, and return the log's records; record 0 has the held-out loss before training."""

    def stop_at_the_end(record: dict[str, Any]) -> None:
        if record["step"] == recipe.schedule.total_steps:
            raise _LastStepSeen

    log = recipe.run_folder / LOG_NAME
    log.unlink(missing_ok=True)
    with suppress(_LastStepSeen):
        train(recipe, stop_at_the_end)
    return read_log(log)
