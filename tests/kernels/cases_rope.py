"""Shapes of split_qkv, real ones and awkward ones."""

# Shapes: B sequences, S their length, G query groups, N heads, D head dim, R channels that turn.

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.kernels.cases import BF16, FP32


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitQkvCase:
    """Packed rows [B, S, G, per_group + 2, D] of which R channels a head turn; all of them by default."""

    B: int = 2
    S: int
    G: int
    per_group: int
    D: int
    R: int | None = None
    model: str = ""
    dtype: torch.dtype = BF16
    weight_dtype: torch.dtype | None = BF16
    scale: float = 1.0
    eps: float = 1e-6

    def __str__(self) -> str:
        norm = "plain" if self.weight_dtype is None else f"weight-{str(self.weight_dtype).removeprefix('torch.')}"
        sizes = f"{self.B}x{self.S}x{self.G}x{self.per_group}x{self.D}-{self.turned}"
        return f"{self.model or 'small'}-{sizes}-{str(self.dtype).removeprefix('torch.')}-{norm}"

    @property
    def turned(self) -> int:
        return self.D if self.R is None else self.R


# No token, one channel pair, one head, heads that fill no tile, widths that are no powers of two, channels that do not
# turn, more tiles than programs of the backward pass, an eps that weighs as much as the rows.
SMALL_SPLIT_QKV = [
    SplitQkvCase(B=0, S=4, G=1, per_group=1, D=8),
    SplitQkvCase(B=1, S=1, G=1, per_group=1, D=2),
    SplitQkvCase(S=5, G=2, per_group=3, D=16),
    SplitQkvCase(S=7, G=4, per_group=4, D=128),
    SplitQkvCase(S=33, G=1, per_group=7, D=80, R=32),
    SplitQkvCase(S=6, G=3, per_group=1, D=96, weight_dtype=None),
    SplitQkvCase(S=6, G=2, per_group=2, D=64, R=16, weight_dtype=None),
    SplitQkvCase(S=9, G=1, per_group=2, D=577, R=578 // 2 - 1),
    SplitQkvCase(S=9, G=2, per_group=8, D=256, weight_dtype=FP32),
    SplitQkvCase(S=11, G=2, per_group=4, D=24, dtype=FP32, weight_dtype=FP32),
    SplitQkvCase(S=5, G=2, per_group=2, D=64, R=32, dtype=FP32, weight_dtype=FP32),
    SplitQkvCase(S=5, G=1, per_group=4, D=128, dtype=FP32, weight_dtype=None),
    SplitQkvCase(B=1, S=200, G=4, per_group=2, D=16),
    SplitQkvCase(S=5, G=2, per_group=3, D=32, scale=1e-3),
]
REAL_SPLIT_QKV = [
    SplitQkvCase(B=2, S=8192, G=8, per_group=4, D=128, weight_dtype=None, model="llama3-8b"),
    SplitQkvCase(B=4, S=4096, G=8, per_group=6, D=128, weight_dtype=None, model="mixtral-8x22b"),
    SplitQkvCase(B=4, S=4096, G=4, per_group=7, D=128, weight_dtype=None, model="qwen2-57b-a14b"),
    SplitQkvCase(B=4, S=4096, G=4, per_group=8, D=128, model="qwen3-30b-a3b"),
]
