"""Saving and resuming a run: a Megatron-Core checkpoint with weights, optimizer, data position and random state."""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ckptbridge.converters.disk import PARTIAL_SUFFIX
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.model import Model
from ckptbridge.converters.training_checkpoint import (
    TrainingCheckpoint,
    load_training_checkpoint,
    save_training_checkpoint,
)
from ckptbridge.trainer.data import TokenStream
from ckptbridge.trainer.decoder import Decoder
from ckptbridge.trainer.loading import check_values
from ckptbridge.trainer.optimizer import Optimizer

CHECKPOINTS = "checkpoints"
"""Where they lie in a run folder."""
_KEY = "ckptbridge_trainer"
_ITERATION = re.compile(r"iter_(\d{7,})")


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedRun:
    """The newest checkpoint of a run, of which headers and the trainer's own items were read."""

    folder: Path
    before: Path | None
    """The checkpoint before it, if there is one."""
    checkpoint: TrainingCheckpoint
    state: dict[str, Any]

    @property
    def described(self) -> dict[str, Any]:
        """The model of the run, as `save` was told of it; nothing in checkpoints that are older than that."""
        return self.state.get("model", {})


def save(
    root: Path,
    *,
    model: Model,
    described: Mapping[str, Any],
    decoder: Decoder,
    optimizer: Optimizer,
    stream: TokenStream,
    step: int,
    keep: int,
) -> Path:
    """Write root/iter_<step> (it appears only when it is whole), then delete all but the newest `keep`.

    `described` are plain values by which a resumed run knows its model.
    """
    state = {"step": step, "data": stream.state_dict(), "random": _random_state(), "model": dict(described)}
    folder = save_training_checkpoint(
        root,
        model=model,
        iteration=step,
        weights={name: parameter.detach() for name, parameter in decoder.named_parameters()},
        optimizer=optimizer.state(),
        common={_KEY: state},
    )
    for old in complete_checkpoints(root)[:-keep]:
        # First the name goes, so that a half-deleted folder is not taken for a whole one.
        shutil.rmtree(old.rename(old.with_name(old.name + PARTIAL_SUFFIX)))
    return folder


def newest_checkpoint(root: Path) -> SavedRun | None:
    """Open the newest checkpoint of a run; None if there is none.

    Raises BadInputError if it is damaged, saying where the run would continue without it, or is of no run.
    """
    checkpoints = complete_checkpoints(root)
    if not checkpoints:
        return None
    folder, before = checkpoints[-1], checkpoints[-2] if len(checkpoints) > 1 else None
    with _saying_what_to_delete(folder, before):
        checkpoint = load_training_checkpoint(folder)
    state = checkpoint.common.get(_KEY)
    if state is None:
        raise BadInputError(f"{folder}: the checkpoint is not from this trainer; start from it with model.init_from")
    return SavedRun(folder=folder, before=before, checkpoint=checkpoint, state=state)


def resume(saved: SavedRun, *, decoder: Decoder, optimizer: Optimizer, stream: TokenStream) -> int:
    """Take over a checkpoint of the run and return its step.

    What follows is bit for bit what an unbroken run would have computed, on the same machine and thread count.
    Raises BadInputError if the data are others, or the checkpoint is damaged.
    """
    stream.load_state_dict(saved.state["data"])
    with _saying_what_to_delete(saved.folder, saved.before):
        optimizer.load(saved.checkpoint.optimizer, saved.state["step"])
        check_values(decoder)
    _set_random_state(saved.state["random"])
    return saved.state["step"]


def remove_unfinished(root: Path) -> None:
    """Delete what killed runs left of checkpoints that they were writing or deleting."""
    for folder in root.glob("iter_*" + PARTIAL_SUFFIX):
        shutil.rmtree(folder)


@contextmanager
def _saying_what_to_delete(folder: Path, before: Path | None) -> Generator[None]:
    try:
        yield
    except BadInputError as error:
        then = "begins anew" if before is None else f"continues from {before.name}"
        raise type(error)(
            f"{error}\nif the newest checkpoint, {folder}, is damaged, delete it: the run then {then}"
        ) from error


def complete_checkpoints(root: Path) -> list[Path]:
    """The folders iter_<step> of a run, oldest first. One that was being written has another name."""
    found = {int(m[1]): path for path in root.glob("iter_*") if (m := _ITERATION.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def _random_state() -> dict[str, Any]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def _set_random_state(states: dict[str, str]) -> None:
    tensors = {
        name: torch.frombuffer(bytearray(base64.b64decode(state)), dtype=torch.uint8) for name, state in states.items()
    }
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(tensors["cuda"])
