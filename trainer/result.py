"""What a finished run left behind, for those who started it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ckptbridge.trainer.checkpoint import CHECKPOINTS, complete_checkpoints
from ckptbridge.trainer.log import LOG_NAME, read_log
from ckptbridge.trainer.profile_run import Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What a finished run left behind."""

    log: Path
    steps: int
    resumed_from: int
    checkpoint: Path
    """The newest checkpoint's folder."""
    hf: Path | None
    """The exported Hugging Face folder, if one was asked for."""
    held_out_before: float | None
    """Before the first step; None if it was not measured, or its line of the log is gone."""
    held_out_after: float | None
    kernels: str
    """The sentence that says which kernels ran, and why."""
    notes: tuple[str, ...]
    """Sentences: whether steps were replayed as a CUDA graph, and what memory was planned on a GPU."""
    profile: Profile | None
    """Where the profiled steps went, if any were asked for and reached."""


def result_of(run: Path, first: int, hf: Path | None, told: list[str], profile: Profile | None) -> TrainResult:
    """The result of a run that was resumed from step `first`, told from its log as far as there is one.

    `told` begins with the sentence about kernels.
    """
    records = read_log(run / LOG_NAME)
    held_out = {record["step"]: loss for record in records if (loss := record.get("held_out_loss")) is not None}
    return TrainResult(
        log=run / LOG_NAME,
        steps=records[-1]["step"] if records else first,
        resumed_from=first,
        checkpoint=complete_checkpoints(run / CHECKPOINTS)[-1],
        hf=hf,
        held_out_before=held_out.get(0),
        held_out_after=held_out[max(held_out)] if held_out else None,
        kernels=told[0],
        notes=tuple(told[1:]),
        profile=profile,
    )
