"""Saving and resuming a run: a Megatron-Core checkpoint with weights, optimizer, data position and random state."""

from __future__ import annotations

import base64
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.model import Model
from ckptbridge.converters.training_checkpoint import load_training_checkpoint, save_training_checkpoint
from ckptbridge.trainer.data import TokenStream
from ckptbridge.trainer.decoder import Decoder
from ckptbridge.trainer.optimizer import Optimizer

_KEY = "ckptbridge_trainer"
_ITERATION = re.compile(r"iter_(\d{7,})")


def save(
    root: Path, *, model: Model, decoder: Decoder, optimizer: Optimizer, stream: TokenStream, step: int, keep: int
) -> Path:
    """Write root/iter_<step> (it appears only when it is whole), then delete all but the newest `keep`."""
    folder = save_training_checkpoint(
        root,
        model=model,
        iteration=step,
        weights={name: parameter.detach() for name, parameter in decoder.named_parameters()},
        optimizer=optimizer.state(),
        common={_KEY: {"step": step, "data": stream.state_dict(), "random": _random_state()}},
    )
    for old in complete_checkpoints(root)[:-keep]:
        # First the name goes, so that a half-deleted folder is not taken for a whole one.
        shutil.rmtree(old.rename(old.with_name(old.name + ".partial")))
    return folder


def resume(root: Path, *, optimizer: Optimizer, stream: TokenStream) -> int:
    """Take over the newest checkpoint of the run and return its step; 0 if there is none.

    What follows is bit for bit what an unbroken run would have computed, on the same machine and thread count.
    """
    checkpoints = complete_checkpoints(root)
    if not checkpoints:
        return 0
    checkpoint = load_training_checkpoint(checkpoints[-1])
    state = checkpoint.common.get(_KEY)
    if state is None:
        raise BadInputError(
            f"{checkpoints[-1]}: the checkpoint is not from this trainer; start from it with model.init_from"
        )
    stream.load_state_dict(state["data"])
    optimizer.load(checkpoint.optimizer, state["step"])
    _set_random_state(state["random"])
    return state["step"]


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
