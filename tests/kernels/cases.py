"""The shapes that tests and benchmarks share, those of real models and awkward ones, and random tensors for them."""

# Shapes: R rows, H hidden_size, F the width of a half of [gate_proj; up_proj].

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BF16, FP32 = torch.bfloat16, torch.float32
T = 16384  # tokens of a training step on one GPU


@dataclass(frozen=True, slots=True, kw_only=True)
class RmsNormCase:
    """x and residual [R, H], weight [H]."""

    R: int
    H: int
    model: str = ""
    dtype: torch.dtype = BF16
    weight_dtype: torch.dtype = BF16
    has_residual: bool = True
    eps: float = 1e-5
    scale: float = 1.0  # of x
    aligned: bool = True  # to 16 bytes

    def __str__(self) -> str:
        tensors = f"{_short(self.dtype)}-weight-{_short(self.weight_dtype)}{'-residual' if self.has_residual else ''}"
        return f"{self.model or 'small'}-{self.R}x{self.H}-{tensors}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SwigluCase:
    """x [R, 2F]."""

    R: int
    F: int
    model: str = ""
    dtype: torch.dtype = BF16
    aligned: bool = True  # to 16 bytes

    def __str__(self) -> str:
        return f"{self.model or 'small'}-{self.R}x2x{self.F}-{_short(self.dtype)}"


# The layers of models that are trained here, at 16,384 tokens; experts see tokens x top-k rows.
REAL_RMS_NORM = [
    RmsNormCase(R=T, H=2048, model="qwen3-30b-a3b"),
    RmsNormCase(R=T, H=3584, model="qwen2-57b-a14b"),
    RmsNormCase(R=T, H=4096, model="llama3-8b"),
    RmsNormCase(R=T, H=4096, model="llama3-8b-first", has_residual=False),
    RmsNormCase(R=T, H=6144, model="mixtral-8x22b"),
    RmsNormCase(R=T, H=7168, model="deepseek-v3"),
    RmsNormCase(R=T, H=8192, model="llama3-70b"),
    RmsNormCase(R=T * 32, H=128, model="qwen3-30b-a3b-q", has_residual=False),
]
REAL_SWIGLU = [
    SwigluCase(R=T * 8, F=768, model="qwen3-30b-a3b"),
    SwigluCase(R=T * 8, F=2560, model="qwen2-57b-a14b"),
    SwigluCase(R=T, F=20480, model="qwen2-57b-a14b-shared"),
    SwigluCase(R=T, F=14336, model="llama3-8b"),
    SwigluCase(R=T * 2, F=14336, model="llama3-e8t2"),
    SwigluCase(R=T * 2, F=16384, model="mixtral-8x22b"),
]

# Small enough for Triton's interpreter, and chosen for what can go wrong: no row, one row, one column, widths that are
# no multiple of 16 bytes or of a block, rows that do not fill the last tile, more tiles than programs of the backward
# pass, the widest row, eps that weighs as much as x, addresses that no 16-byte load may touch.
SMALL_RMS_NORM = [
    *(RmsNormCase(R=R, H=H) for R, H in [(0, 64), (1, 64), (5, 1), (3, 2), (33, 130), (1030, 16), (9, 6144)]),
    *(RmsNormCase(R=R, H=H, dtype=FP32, weight_dtype=FP32) for R, H in [(1, 1), (7, 577), (11, 4096), (3, 16384)]),
    RmsNormCase(R=11, H=3584, weight_dtype=FP32),
    RmsNormCase(R=70, H=128, has_residual=False),
    RmsNormCase(R=6, H=2048, dtype=FP32, has_residual=False),
    RmsNormCase(R=9, H=577, scale=3e-3, aligned=False),
]
SMALL_SWIGLU = [
    *(SwigluCase(R=R, F=F) for R, F in [(0, 16), (1, 64), (4, 1), (3, 577), (5, 768), (2, 2560), (1, 14336)]),
    *(SwigluCase(R=R, F=F, dtype=FP32) for R, F in [(1, 1), (129, 24), (3, 577), (17, 96), (2, 6144)]),
    SwigluCase(R=9, F=96, aligned=False),
]


def random_tensor(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, *, scale: float = 1.0, aligned: bool = True
) -> Tensor:
    """Normal numbers in the middle of NaN, so that a read before the first or after the last element shows."""
    numel = torch.Size(shape).numel()
    guard = 64 if aligned else 1
    memory = torch.full((numel + 2 * guard,), torch.nan, dtype=dtype, device=generator.device)
    tensor = memory[guard : guard + numel].view(shape)
    return tensor.normal_(std=scale, generator=generator)


def _short(dtype: torch.dtype) -> str:
    return {BF16: "bf16", FP32: "fp32"}[dtype]
