"""Two models' logits compared some words at a time: a vocabulary of any size in bounded memory.

Shapes: T tokens, W the words of one block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitDifferences:
    """How the mixture's logits differ from a source's. Losses and the KL divergence are in nats a token."""

    loss_source: float
    loss_mixture: float
    kl: float
    """KL(source || mixture), a mean over tokens."""
    max_abs_difference: float
    max_relative_difference: float
    """The largest difference over the largest |logit| of the source."""
    argmax_agreement: float

    @property
    def loss_difference(self) -> float:
        """The mixture's loss less the source's: a jump is positive."""
        return self.loss_mixture - self.loss_source


class _Side:
    """Of one model's logits: the running log-sum-exp, the most likely word and the target's logit, by token."""

    def __init__(self, tokens: int) -> None:
        self.largest_T = torch.full((tokens,), -math.inf, dtype=torch.float64)
        self.sum_T = torch.zeros(tokens, dtype=torch.float64)
        self.best_T = torch.zeros(tokens, dtype=torch.int64)
        self.target_T = torch.zeros(tokens, dtype=torch.float64)

    def add(self, first: int, logits_TW: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
        """Returns exp(logit - largest so far) [T, W], and what earlier such numbers have to be multiplied by [T]."""
        most_T, at_T = logits_TW.max(1)
        self.best_T = torch.where(most_T > self.largest_T, at_T + first, self.best_T)
        largest_T = torch.maximum(self.largest_T, most_T)
        factor_T = (self.largest_T - largest_T).exp()
        share_TW = (logits_TW - largest_T[:, None]).exp()
        self.largest_T, self.sum_T = largest_T, self.sum_T * factor_T + share_TW.sum(1)
        here_T = (targets_T >= first) & (targets_T < first + logits_TW.shape[1])
        self.target_T[here_T] = logits_TW[here_T, targets_T[here_T] - first]
        return share_TW, factor_T

    @property
    def log_sum_T(self) -> Tensor:
        return self.largest_T + self.sum_T.log()


class LogitComparison:
    """Sums over blocks of words, in fp64. `targets_T` is the next token, or -1 where there is none."""

    def __init__(self, targets_T: Tensor) -> None:
        self.targets_T = targets_T
        self.source, self.mixture = _Side(len(targets_T)), _Side(len(targets_T))
        self.weighted_T = torch.zeros(len(targets_T), dtype=torch.float64)
        self.difference = self.largest = torch.zeros((), dtype=torch.float64)

    def add(self, first: int, source_TW: Tensor, mixture_TW: Tensor) -> None:
        """Logits of words [first, first + W) by both."""
        a_TW, b_TW = source_TW.double(), mixture_TW.double()
        difference_TW = a_TW - b_TW
        share_TW, factor_T = self.source.add(first, a_TW, self.targets_T)
        self.mixture.add(first, b_TW, self.targets_T)
        self.weighted_T = self.weighted_T * factor_T + (share_TW * difference_TW).sum(1)
        # torch.maximum keeps NaN, which max() may lose.
        self.difference = torch.maximum(self.difference, difference_TW.abs().max())
        self.largest = torch.maximum(self.largest, a_TW.abs().max())

    def result(self) -> LogitDifferences:
        """What was measured, once all words have gone by."""
        kl_T = self.weighted_T / self.source.sum_T - self.source.log_sum_T + self.mixture.log_sum_T
        difference, largest = self.difference.item(), self.largest.item()
        return LogitDifferences(
            loss_source=self._loss(self.source),
            loss_mixture=self._loss(self.mixture),
            kl=kl_T.mean().item(),
            max_abs_difference=difference,
            max_relative_difference=difference / largest if largest else math.inf,
            argmax_agreement=(self.source.best_T == self.mixture.best_T).double().mean().item(),
        )

    def _loss(self, side: _Side) -> float:
        has_next_T = self.targets_T >= 0
        return (side.log_sum_T - side.target_T)[has_next_T].mean().item()
