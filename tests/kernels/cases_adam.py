"""Flat buffers that tests and benchmarks of Adam share."""

# Shapes: n elements of a flat group.

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.kernels.cases import BF16, FP32


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamCase:
    """A step of Adam over n elements; `weight` is the dtype of weights that are not main weights themselves."""

    n: int
    weight: torch.dtype | None = BF16
    moments: torch.dtype = FP32
    step: int = 3
    coefficient: float | None = 0.3
    lr: float = 1e-3
    weight_decay: float = 0.1
    eps: float = 1e-8
    betas: tuple[float, float] = (0.9, 0.95)
    first: int = 0
    aligned: bool = True  # to 16 bytes

    def __str__(self) -> str:
        kept = {None: "no", BF16: "bf16"}[self.weight]
        return f"{self.n}-weight-{kept}-moments-{'fp32' if self.moments == FP32 else 'bf16'}-step-{self.step}"


# Chosen for what can go wrong: nothing, one element, sizes around a block (1024) and the reference's piece (32768) and
# no multiple of 16 bytes, the first step, where the corrections divide by 0.05, a late one, the usual other betas, an
# eps that weighs, no clipping, no decay, positions beyond 2^32, addresses that no 16-byte load may touch.
SMALL_ADAM = [
    *(AdamCase(n=n) for n in (0, 1, 7, 1023, 1024, 1025, 40001)),
    *(AdamCase(n=n, weight=None) for n in (1, 1030)),
    *(AdamCase(n=n, moments=BF16) for n in (1, 1000, 2048, 40001)),
    AdamCase(n=777, weight=None, moments=BF16, coefficient=None),
    AdamCase(n=1000, step=1, coefficient=None),
    AdamCase(n=1000, step=1, moments=BF16, betas=(0.9, 0.999)),
    AdamCase(n=1000, step=100_000, betas=(0.9, 0.999), lr=1e-5),
    AdamCase(n=1000, eps=1e-2, weight_decay=0.0),
    AdamCase(n=1000, moments=BF16, first=2**32 - 500),
    AdamCase(n=333, aligned=False),
    AdamCase(n=333, moments=BF16, aligned=False),
]

# A small model, and about what the slices qwen3-30b-a3b and llama3-e8t2 of benchmarks/slices.py hold.
REAL_ADAM = [600_000_000, 2_500_000_000, 3_200_000_000]
