"""The learning rate of each step: a linear warmup, then half a cosine down to a floor."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Steps are counted from 1. The peak `lr` is at step `warmup_steps`, or at step 1 without a warmup.

    `min_lr` would be reached one step after the last: with a floor of zero no step is wasted.
    """

    lr: float
    min_lr: float
    warmup_steps: int
    total_steps: int

    def at(self, step: int) -> float:
        """The learning rate with which step `step` updates the weights."""
        if step < self.warmup_steps:
            return self.lr * step / self.warmup_steps
        peak = max(self.warmup_steps, 1)
        done = min((step - peak) / (self.total_steps + 1 - peak), 1.0)
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * done))
