"""Runs whose numbers are no numbers any more: they end before anything is saved over what was good."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

from ckptbridge.converters.errors import BadInputError
from ckptbridge.trainer.checkpoint import CHECKPOINTS, complete_checkpoints
from ckptbridge.trainer.decoder import Decoder
from ckptbridge.trainer.loading import unlikely_weights
from ckptbridge.trainer.recipe import Recipe

_NUMBERS = ("loss", "grad_norm", "held_out_loss")


def lost_numbers(record: Mapping[str, Any]) -> list[str]:
    """What of a step's record is NaN or infinite, each as `loss is nan`; only numbers that a run lives by count."""
    return [f"{name} is {record[name]}" for name in _NUMBERS if name in record and not isfinite(record[name])]


def refuse_divergence(record: Mapping[str, Any], recipe: Recipe) -> None:
    """Raise BadInputError if a step's loss, gradient or held-out loss is no number."""
    if not (lost := lost_numbers(record)):
        return
    if not record["step"]:
        raise BadInputError(
            f"before the first step: {', '.join(lost)}; nothing was trained. Set precision to fp32, or look for what "
            "is wrong with model.init_from"
        )
    raise BadInputError(f"step {record['step']}: {', '.join(lost)}: the run diverged. {_advice(recipe)}")


def refuse_unlikely_weights(decoder: Decoder, step: int, recipe: Recipe) -> None:
    """Raise BadInputError if the weights after a step are none that a resumed run would take (see `check_values`)."""
    if problems := unlikely_weights(decoder):
        raise BadInputError(
            f"step {step}: the run diverged, what it made of the weights cannot be a model's:\n  "
            + "\n  ".join(problems)
            + f"\n{_advice(recipe)}"
        )


def _advice(recipe: Recipe) -> str:
    kept, options = complete_checkpoints(recipe.run_folder / CHECKPOINTS), recipe.optimizer
    clip = f"lower optimizer.clip_grad (it is {options.clip_grad})" if options.clip_grad else "set optimizer.clip_grad"
    change = f"Lower optimizer.lr (it is {options.lr}) or {clip}"
    if not kept:
        return f"No checkpoint was written. {change}, and start again"
    told = f"Nothing was saved since the newest checkpoint, {kept[-1]}. {change}: the run then continues from there"
    return f"{told}, or from {kept[-2].name} if you delete it" if len(kept) > 1 else told
