"""What an upcycle ends with: how far the mixture is from what it was made of, what it costs, and how to train it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ckptbridge.converters.model import Model, count_parameters
from ckptbridge.converters.upcycling.factors import expert_factors, shared_factors
from ckptbridge.converters.upcycling.semantics import check
from ckptbridge.converters.upcycling.spec import DENSE_METHODS, UpcycleSpec
from ckptbridge.trainer.text_ids import text_ids
from ckptbridge.trainer.upcycling.flops import flops_a_token
from ckptbridge.trainer.upcycling.logit_differences import LogitDifferences
from ckptbridge.trainer.upcycling.probe import LayerProbe, probe
from ckptbridge.trainer.upcycling.rounding import as_written, narrowed_to
from ckptbridge.trainer.upcycling.settings import Setting, recommended_settings
from ckptbridge.trainer.upcycling.streaming import OnProgress

REPORT_FILE = "upcycle.json"
"""The report's name beside the weights."""
PROBE_TOKENS = 256
"""Enough to see a fault; a model of 8 billion parameters takes minutes on two cores."""
TOLERANCE = 1e-5
"""Of the largest |logit|: what rounding in fp32 may leave between two ways to compute the same."""
_ROUNDING_TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1.25e-3}
"""The same where an exact factor is no power of two, so that every weight is rounded to the dtype once more."""
_MOST_GROWTH = 100
"""Rounding grows from layer to layer, by as much as a model amplifies it: 80 layers, or random weights of size 1, take
1e-6 beyond the tolerance. Where no layer differs by itself, so much more is let through."""
_SEQUENCE_LENGTH = 4096
"""FLOPs are those of a token in the middle of such a sequence, or of the longest that the model was made for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a model takes: parameters, those that a token meets, FLOPs of a token's forward pass."""

    parameters: int
    active_parameters: int
    flops_a_token: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UpcycleReport:
    """How a mixture compares with its source, or with each of its sources, on one text; computed in fp32."""

    sources: tuple[str, ...]
    method: str
    architecture: str
    text: str
    tokens: int
    is_exact: bool
    """Whether the mixture is meant to compute what its source does."""
    inexact: tuple[str, ...]
    """Why it is not."""
    conditions: tuple[str, ...]
    """What has to hold while it is used, for it to be exact."""
    rounded_to: str | None
    """The dtype, such as bf16, of a mixture that is written in a narrower one than its source's."""
    tolerance: float
    """What max_relative_difference may be for an exact mixture to pass."""
    layers: tuple[LayerProbe, ...]
    """Against the first source; of an exact mixture with `rounded_to`, against that source rounded as well."""
    logits: tuple[LogitDifferences, ...]
    """Against each source as it is, in order."""
    rounded: LogitDifferences | None
    """Of an exact mixture with `rounded_to`: against the source whose weights are rounded as well."""
    cost_source: Cost
    cost_mixture: Cost
    flops_sequence_length: int
    """FLOPs are those of a token in the middle of a sequence of this length."""
    settings: tuple[Setting, ...]

    @property
    def judged(self) -> LogitDifferences:
        """Against what the mixture is meant to compute: the source, rounded as the mixture is."""
        return self.rounded or self.logits[0]

    @property
    def passed(self) -> bool:
        """False for what cannot be used: numbers that are not finite, or an exact mixture that is not."""
        if not all(math.isfinite(found.max_abs_difference) and math.isfinite(found.kl) for found in self.logits):
            return False
        within = self.judged.max_relative_difference <= self.tolerance
        return not self.is_exact or within or self.is_grown_rounding

    @property
    def largest_by_itself(self) -> float:
        """The largest difference of a layer's own output."""
        return max(_or_infinite(layer.output_difference) for layer in self.layers)

    @property
    def is_grown_rounding(self) -> bool:
        """Whether logits differ by more than the tolerance, but no layer does by itself, nor what leaves the first."""
        found = self.judged.max_relative_difference
        first = self.layers[0].hidden_difference
        return (
            self.tolerance < found <= _MOST_GROWTH * self.tolerance
            and self.largest_by_itself <= self.tolerance
            and first <= self.tolerance
        )

    @property
    def first_defect(self) -> int | None:
        """Of an exact mixture that did not pass, the layer that differs most by itself."""
        if self.passed or not self.is_exact:
            return None
        return max(self.layers, key=lambda layer: _or_infinite(layer.output_difference)).layer

    def to_json(self) -> dict[str, Any]:
        """The report for machines, with `passed`. What is not finite becomes null."""
        told: dict[str, Any] = _finite({"passed": self.passed, "first_defect": self.first_defect, **asdict(self)})
        for shown, layer in zip(told["layers"], self.layers, strict=True):
            shown["busiest"] = layer.busiest
        for shown, found in zip(told["logits"], self.logits, strict=True):
            shown["loss_difference"] = _finite(found.loss_difference)
        if self.rounded is not None:
            told["rounded"]["loss_difference"] = _finite(self.rounded.loss_difference)
        return told


def report(
    sources: Model | Sequence[Model],
    mixture: Model,
    spec: UpcycleSpec,
    ids: Tensor | Sequence[Tensor] | None = None,
    described: str = "",
    on_progress: OnProgress | None = None,
) -> UpcycleReport:
    """Run token ids (one sequence [S] or several) through the source and the mixture, and compare.

    `sources` are several for branch-train-mix. Without ids it is the built-in text through the model's tokenizer, or
    ids drawn with a fixed seed where there is none; `described` says which text the ids are. The mixture may be the
    view that was not written yet, or what was written. Raises BadInputError if the models' sizes differ.
    """
    sources = [sources] if isinstance(sources, Model) else list(sources)
    spec, source = spec.resolved(), sources[0]
    if ids is None:
        ids, described = text_ids([*sources, mixture], None, PROBE_TOKENS)
    sequences = [ids] if isinstance(ids, Tensor) else list(ids)
    exactness, rounded_to = check(spec, source.config), narrowed_to(sources, mixture)
    inexact, conditions = exactness.inexact, exactness.conditions
    alike: list[Model] = []
    if rounded_to is not None and exactness.is_exact:
        alike = [as_written(source, mixture.dtype)]
        conditions = (*conditions, f"the source's weights are rounded to {rounded_to} as the mixture's are")
    elif rounded_to is not None:
        inexact = (*inexact, f"the weights are rounded to {rounded_to}")
    found = probe([*alike, *sources], mixture, sequences, on_progress)
    length = min(_SEQUENCE_LENGTH, source.config.max_position_embeddings)
    return UpcycleReport(
        sources=tuple(str(model.path) for model in sources),
        method=spec.method or "",
        architecture=mixture.family.architecture,
        text=described or "the text given",
        tokens=sum(map(len, sequences)),
        is_exact=exactness.is_exact,
        inexact=inexact,
        conditions=conditions,
        rounded_to=rounded_to,
        tolerance=_tolerance(spec, source, mixture),
        layers=found.layers,
        logits=found.logits[len(alike) :],
        rounded=found.logits[0] if alike else None,
        cost_source=_cost(source, length),
        cost_mixture=_cost(mixture, length),
        flops_sequence_length=length,
        settings=recommended_settings(spec),
    )


def _tolerance(spec: UpcycleSpec, source: Model, mixture: Model) -> float:
    """Weights take a factor in the source's dtype, and are rounded to the mixture's then."""
    if spec.method not in DENSE_METHODS:
        return TOLERANCE
    used = [expert_factors(spec, source.config)]
    if spec.shared != "none":
        used.append(shared_factors(spec, is_gated=mixture.config.moe_shared_expert_gate))
    factors = {factor for each in used for factor in (each.gate, each.up, each.down)}
    lossy = {dtype for dtype in (source.dtype, mixture.dtype) if not all(map(_loses_nothing, factors))}
    if mixture.dtype == torch.float16 != source.dtype and not factors <= {0.0, 1.0}:
        lossy.add(torch.float16)  # what a factor of two lifts out of its subnormal numbers is rounded less
    return max((_ROUNDING_TOLERANCE.get(dtype, TOLERANCE) for dtype in lossy), default=TOLERANCE)


def _loses_nothing(factor: float) -> bool:
    """Whether bits stay what they are: zero and powers of two have a mantissa of 0 or 1/2."""
    return math.frexp(factor)[0] in (0.0, 0.5)


def _cost(model: Model, length: int) -> Cost:
    total, active = count_parameters(model.tensors, model.config)
    return Cost(parameters=total, active_parameters=active, flops_a_token=flops_a_token(model, (length + 1) / 2))


def _or_infinite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (tuple, list)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
