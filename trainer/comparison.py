"""Two forward passes over one text: the first is recorded in files, others are measured against it as they come.

Shapes: T tokens, H hidden_size, V vocab_size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Differences:
    """How B's pass differs from A's. Losses and the KL divergence are in nats a token; NaN passes for nothing."""

    loss_a: float
    loss_b: float
    kl: float
    max_abs_logit_difference: float
    max_relative_logit_difference: float
    argmax_agreement: float
    stages: dict[str, float]

    @property
    def loss_difference(self) -> float:
        return abs(self.loss_a - self.loss_b)

    @property
    def largest(self) -> float:
        """What a tolerance bounds: the larger one of the losses' difference and the KL divergence; inf for NaN."""
        values = (self.loss_difference, self.kl)
        return math.inf if any(map(math.isnan, values)) else max(values)


class Recording:
    """Tensors in files, so that memory holds one model and not its logits too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stages: dict[str, Tensor] = {}
        self.chunks: dict[int, Tensor] = {}

    def hidden(self, stage: str, x_TH: Tensor) -> None:
        self.stages[stage] = self._kept(stage, x_TH)

    def logits(self, start: int, logits_TV: Tensor) -> None:
        self.chunks[start] = self._kept(f"logits.{start}", logits_TV)

    def _kept(self, name: str, tensor: Tensor) -> Tensor:
        kept = torch.from_file(str(self.folder / name), shared=True, size=tensor.numel(), dtype=torch.float32)
        return kept.view(tensor.shape).copy_(tensor)


class Comparison:
    """Sums and maxima over B's forward pass against A's recorded one. Logits are compared in fp64."""

    def __init__(self, a: Recording, ids_T: Tensor) -> None:
        self.a, self.ids_T = a, ids_T
        self.stages: dict[str, float] = {}
        self.loss_a = self.loss_b = self.kl = 0.0
        self.difference = self.largest = 0.0
        self.agreeing = 0

    def hidden(self, stage: str, b_TH: Tensor) -> None:
        a_TH = self.a.stages.get(stage)
        if a_TH is None or a_TH.shape != b_TH.shape:
            self.stages[stage] = math.inf
            return
        self.stages[stage] = relative_difference(a_TH, b_TH).mean().item()

    def logits(self, start: int, b_TV: Tensor) -> None:
        a_TV = self.a.chunks[start]
        before = self.stages.get("output_layer", 0.0)
        self.stages["output_layer"] = before + relative_difference(a_TV, b_TV).sum().item() / len(self.ids_T)
        self.difference = _largest(self.difference, (a_TV - b_TV).abs())
        self.largest = _largest(self.largest, a_TV.abs())
        self.agreeing += int((a_TV.argmax(1) == b_TV.argmax(1)).sum())
        log_a, log_b = (x.log_softmax(1, dtype=torch.float64) for x in (a_TV, b_TV))
        self.kl += (log_a.exp() * (log_a - log_b)).sum().item()
        targets = self.ids_T[start + 1 : start + 1 + len(b_TV), None]
        self.loss_a -= log_a[: len(targets)].gather(1, targets).sum().item()
        self.loss_b -= log_b[: len(targets)].gather(1, targets).sum().item()

    def differences(self) -> Differences:
        """What was measured, once the whole pass has gone by."""
        count = len(self.ids_T)
        return Differences(
            loss_a=self.loss_a / (count - 1),
            loss_b=self.loss_b / (count - 1),
            kl=self.kl / count,
            max_abs_logit_difference=self.difference,
            max_relative_logit_difference=self.difference / self.largest if self.largest else math.inf,
            argmax_agreement=self.agreeing / count,
            stages=self.stages,
        )


def _largest(a: float, b: Tensor) -> float:
    """The larger one; NaN if either is NaN, which max() would lose."""
    return torch.maximum(torch.tensor(a), b.max()).item()


def relative_difference(a: Tensor, b: Tensor) -> Tensor:
    """|a - b| / |a| of each row."""
    return (a - b).norm(dim=1) / a.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
