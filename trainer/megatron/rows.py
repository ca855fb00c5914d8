"""Two checkpoints compared where the real megatron-core computes those of its format: a row for each layout.

Shapes: T tokens, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ckptbridge.converters.convert import plan_conversion
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import Model, open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.trainer.comparison import Comparison, Differences, Recording
from ckptbridge.trainer.megatron.launch import Computed, Run, compute
from ckptbridge.trainer.megatron.layouts import layout_name
from ckptbridge.trainer.observed import LOGIT_CHUNK, OnLogits, observe


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutRow:
    """One checkpoint as megatron-core computes it under one layout, against A (in A's own rows: its first layout)."""

    checkpoint: Literal["a", "b"]
    layout: str
    passed: bool
    """Whether its numbers are within the tolerance and its keys are those that Megatron asks for."""
    loss: float
    """Nats a token; NaN if a weight is missing."""
    loss_difference: float
    kl: float
    max_abs_logit_difference: float
    missing_keys: tuple[str, ...]
    """What Megatron asks for and the checkpoint lacks, numbers of layers folded."""
    unexpected_keys: tuple[str, ...]
    """Weights that no rank asks for."""


def compare_by_megatron(
    a: Model,
    b: Model,
    layouts: Sequence[ParallelLayout],
    ids_T: Tensor,
    dtype: torch.dtype,
    tolerance: float,
    folder: Path,
) -> tuple[Differences, tuple[LayoutRow, ...]]:
    """B against A, under the layout where they differ most, and a row for each Megatron checkpoint and layout.

    A checkpoint of another format than torch_dist is first written as one: only that is loaded under every layout.
    Temporary files go into `folder`. Raises BadInputError if neither is a Megatron checkpoint; and see `compute`.
    """
    a, b = _as_torch_dist(a, folder / "converted-a"), _as_torch_dist(b, folder / "converted-b")
    runs = [Run(model=model, layout=layout) for model in (a, b) if model.format != "hf" for layout in layouts]
    if not runs:
        raise BadInputError(
            f"neither {a.path} nor {b.path} is a Megatron checkpoint, so engine megatron has nothing to compute"
        )
    computed = compute(runs, ids_T, dtype, folder)
    recorded = Recording(folder)
    rows: list[LayoutRow] = []
    of_b: list[Differences] = []
    if a.format == "hf":
        observe(a, ids_T, dtype, _ignored, recorded.logits)
    with closing(computed):
        for result in computed:
            if not recorded.chunks:
                _pass(result.logits_TV, recorded.logits)
            compared = Comparison(recorded, ids_T)
            _pass(result.logits_TV, compared.logits)
            differences = compared.differences()
            rows.append(_row("a" if result.run.model is a else "b", result, differences, tolerance))
            if result.run.model is b:
                of_b.append(differences)
    if b.format == "hf":
        compared = Comparison(recorded, ids_T)
        observe(b, ids_T, dtype, _ignored, compared.logits)
        of_b.append(compared.differences())
    return max(of_b, key=lambda differences: differences.largest), tuple(rows)


def _as_torch_dist(model: Model, target: Path) -> Model:
    if model.format in ("hf", "torch_dist"):
        return model
    execute(plan_conversion(model, target, "torch_dist"))
    return open_model(target)


def _row(checkpoint: Literal["a", "b"], result: Computed, differences: Differences, tolerance: float) -> LayoutRow:
    return LayoutRow(
        checkpoint=checkpoint,
        layout=layout_name(result.run.layout),
        passed=differences.largest <= tolerance and not (result.missing_keys or result.unexpected_keys),
        loss=differences.loss_b,
        loss_difference=differences.loss_difference,
        kl=differences.kl,
        max_abs_logit_difference=differences.max_abs_logit_difference,
        missing_keys=result.missing_keys,
        unexpected_keys=result.unexpected_keys,
    )


def _pass(logits_TV: Tensor, on_logits: OnLogits) -> None:
    for start in range(0, len(logits_TV), LOGIT_CHUNK):
        on_logits(start, logits_TV[start : start + LOGIT_CHUNK])


def _ignored(stage: str, x_TH: Tensor) -> None:
    """Megatron's layers are on other processes: only logits are compared."""
