"""Shapes of linear_cross_entropy and of the kernel inside it, real ones and awkward ones."""

# Shapes: T tokens, C tokens of a chunk, H hidden_size, V vocab_size.

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.kernels.cases import BF16, FP32


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLossCase:
    """Logits [C, V] whose rows lie `gap` elements further apart than they are long."""

    C: int
    V: int
    dtype: torch.dtype = BF16
    gap: int = 0
    scale: float = 3.0  # of the logits
    divisor: float | None = 7.0

    def __str__(self) -> str:
        gradient = "" if self.divisor is None else "-gradient"
        return f"{self.C}x{self.V}+{self.gap}-{str(self.dtype).removeprefix('torch.')}-{self.scale}{gradient}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEntropyCase:
    """hidden [T, H], weight [V, H], and how many tokens make a chunk."""

    T: int
    H: int
    V: int
    chunk: int | None = None
    model: str = ""
    dtype: torch.dtype = BF16

    def __str__(self) -> str:
        return f"{self.model or 'small'}-{self.T}x{self.H}x{self.V}-{str(self.dtype).removeprefix('torch.')}"


# What can go wrong: no token, one word, rows that end within a block or at its border or one behind it, rows that start
# at odd addresses, a probability of one, more words than any vocabulary has.
SMALL_TOKEN_LOSSES = [
    *(TokenLossCase(C=C, V=V) for C, V in [(0, 8), (3, 1), (5, 2), (4, 577), (3, 4096), (2, 4097), (2, 50257)]),
    *(TokenLossCase(C=C, V=V, dtype=FP32) for C, V in [(1, 1), (5, 99), (3, 8191), (2, 32000)]),
    TokenLossCase(C=2, V=262144),
    TokenLossCase(C=4, V=300, gap=20),
    TokenLossCase(C=4, V=300, gap=1, dtype=FP32),
    TokenLossCase(C=4, V=1000, scale=60.0),
    TokenLossCase(C=4, V=5000, scale=60.0, dtype=FP32),
    TokenLossCase(C=4, V=600, divisor=None),
]
REAL_TOKEN_LOSSES = [
    TokenLossCase(C=2048, V=128256),
    TokenLossCase(C=1664, V=151936),
    TokenLossCase(C=2048, V=32768, divisor=None),
]
SMALL_CROSS_ENTROPY = [
    CrossEntropyCase(T=0, H=8, V=16),
    CrossEntropyCase(T=1, H=3, V=5),
    CrossEntropyCase(T=37, H=24, V=99, chunk=16),
    CrossEntropyCase(T=32, H=64, V=130, chunk=16),
    CrossEntropyCase(T=15, H=40, V=1, chunk=16),
    CrossEntropyCase(T=37, H=24, V=99, chunk=16, dtype=FP32),
    CrossEntropyCase(T=50, H=16, V=5000, chunk=1, dtype=FP32),
]
REAL_CROSS_ENTROPY = [
    CrossEntropyCase(T=1024, H=4096, V=128256, chunk=384, model="llama3"),
    CrossEntropyCase(T=1024, H=2048, V=151936, chunk=512, model="qwen3"),
    CrossEntropyCase(T=2048, H=6144, V=32768, model="mixtral-8x22b"),
    CrossEntropyCase(T=512, H=1152, V=262144, chunk=128, model="gemma3"),
]
