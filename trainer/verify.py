"""Zero-shot loss alignment: do two checkpoints, of whatever formats, compute the same?

Shapes: T tokens.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ckptbridge.converters.errors import BadInputError, StorageError
from ckptbridge.converters.model import Model, open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.trainer.comparison import Comparison, Differences, Recording
from ckptbridge.trainer.megatron.rows import LayoutRow, compare_by_megatron
from ckptbridge.trainer.observed import observe
from ckptbridge.trainer.text_ids import text_ids

Engine = Literal["reference", "megatron"]
"""What computes a Megatron checkpoint: this package's decoder, or the real megatron-core."""

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
"""Nats a token that two programs may differ by and still compute the same model."""
STAGE_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""|a - b| / |a| of a hidden state, a mean over tokens, above which a stage is said to differ: ten times what rounding
leaves behind thirty layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """How two checkpoints compare on one text. Losses and the KL divergence are in nats a token.

    With engine "megatron" the numbers of B are those of the layout under which it differs most, if it is a
    Megatron checkpoint, and those of A are those of its first layout.
    """

    a: str
    b: str
    format_a: str
    format_b: str
    dtype: str
    text: str
    """Which text it was, or that token ids were drawn."""
    tokens: int
    loss_a: float
    loss_b: float
    loss_difference: float
    kl: float
    """KL(A || B), a mean over tokens: catches what cancels out in the loss."""
    tolerance: float
    max_abs_logit_difference: float
    max_relative_logit_difference: float
    """The largest difference over the largest |logit| of A."""
    argmax_agreement: float
    """The share of tokens whose most likely next token is the same."""
    stage_differences: dict[str, float]
    """By stage: |a - b| / |a| of a token's hidden state, a mean over tokens. Engine "megatron" shows logits only."""
    first_divergence: str | None
    """The first stage that differs by more than rounding does; None if the checkpoints agree."""
    engine: Engine
    layouts: tuple[LayoutRow, ...]
    """With engine "megatron": each Megatron checkpoint under each layout, A's before B's."""

    @property
    def passed(self) -> bool:
        """Whether the losses' difference and the KL divergence are within the tolerance, and every layout passed."""
        close = self.loss_difference <= self.tolerance and self.kl <= self.tolerance
        return close and all(row.passed for row in self.layouts)

    def to_json(self) -> dict[str, Any]:
        """The report for machines, with `passed`. What is not finite becomes null."""
        return _finite({"passed": self.passed, **asdict(self)})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def verify(
    a: Path,
    b: Path,
    text: str | None = None,
    tokens: int = 1024,
    dtype: torch.dtype = torch.float32,
    tolerance: float | None = None,
    *,
    hf_config: Path | None = None,
    engine: Engine = "reference",
    layouts: Sequence[ParallelLayout] = (),
) -> VerifyReport:
    """Run the first `tokens` tokens of `text` (no BOS; default: the Apache-2.0 licence) through both, and compare.

    One model is in memory at a time: A's hidden states and logits wait in a temporary file. A checkpoint without a
    tokenizer on either side gets token ids drawn with a fixed seed. `hf_config` describes a Megatron checkpoint that
    does not describe itself. Engine "megatron" runs Megatron checkpoints through the real megatron-core, on the CPU,
    under each of the layouts (default: one rank). Raises BadInputError if the two have different vocabularies,
    cannot be opened, or do not go with the engine and the layouts; NotSupportedError if megatron-core is missing.
    """
    if layouts and engine != "megatron":
        raise BadInputError("the reference engine has no ranks to lay out: layouts need engine megatron")
    model_a, model_b = (open_model(path, hf_config=hf_config) for path in (a, b))
    if model_a.config.vocab_size != model_b.config.vocab_size:
        raise BadInputError(
            f"{a} knows {model_a.config.vocab_size} words and {b} {model_b.config.vocab_size}: they are different "
            "models, and their logits cannot be compared"
        )
    ids_T, described = text_ids((model_a, model_b), text, tokens)
    tolerance = TOLERANCES[dtype] if tolerance is None else tolerance
    rows: tuple[LayoutRow, ...] = ()
    try:
        with tempfile.TemporaryDirectory(prefix="ckptbridge-verify-") as name:
            folder = Path(name)
            if engine == "megatron":
                layouts = layouts or [ParallelLayout()]
                found, rows = compare_by_megatron(model_a, model_b, layouts, ids_T, dtype, tolerance, folder)
            else:
                found = _compare_by_reference(model_a, model_b, ids_T, dtype, folder)
    except OSError as error:
        raise StorageError(f"{error.filename or tempfile.gettempdir()}: {error.strerror}") from error
    return VerifyReport(
        a=str(a),
        b=str(b),
        format_a=model_a.format,
        format_b=model_b.format,
        dtype=str(dtype).removeprefix("torch."),
        text=described,
        tokens=len(ids_T),
        loss_a=found.loss_a,
        loss_b=found.loss_b,
        loss_difference=found.loss_difference,
        kl=found.kl,
        tolerance=tolerance,
        max_abs_logit_difference=found.max_abs_logit_difference,
        max_relative_logit_difference=found.max_relative_logit_difference,
        argmax_agreement=found.argmax_agreement,
        stage_differences=found.stages,
        first_divergence=None
        if found.largest <= tolerance
        else _first_divergence(found.stages, STAGE_TOLERANCES[dtype]),
        engine=engine,
        layouts=rows,
    )


def _compare_by_reference(a: Model, b: Model, ids_T: Tensor, dtype: torch.dtype, folder: Path) -> Differences:
    recorded = Recording(folder)
    observe(a, ids_T, dtype, recorded.hidden, recorded.logits)
    compared = Comparison(recorded, ids_T)
    observe(b, ids_T, dtype, compared.hidden, compared.logits)
    return compared.differences()


def _first_divergence(stages: dict[str, float], tolerance: float) -> str:
    """The first stage beyond the tolerance (or NaN); where none is, the one that adds most."""
    for stage, difference in stages.items():
        if not difference <= tolerance:
            return stage
    before = [0.0, *stages.values()]
    return max(zip(stages.items(), before, strict=False), key=lambda pair: pair[0][1] - pair[1])[0][0]
