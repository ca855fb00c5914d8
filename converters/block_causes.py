"""What went wrong with the scales of fp8 weights, told from two tensors that differ by a factor in each block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ckptbridge.converters.fp8_blocks import BlockScaled, BlockSize
from ckptbridge.converters.tensors import LazyTensor

_PUBLISHED = BlockSize(128, 128)
_TOLERANCE = 0.01
"""Rounding both sides to bf16 moves a ratio by 0.4 % at most."""


@dataclass(frozen=True, slots=True)
class _Part:
    """One matrix on both sides, and its scales where a side is fp8 still."""

    a: Tensor
    b: Tensor
    size: BlockSize
    scales: Tensor | None
    coded: str
    """The side that has the scales: "A" or "B"."""


def scale_cause(a: Sequence[LazyTensor], b: Sequence[LazyTensor]) -> str | None:
    """Why the matrices of one parameter differ, if all that differs is one factor for each block of them."""
    parts = [_part(x, y) for x, y in zip(a, b, strict=True)]
    causes = [_cause(part) for part in parts if not torch.equal(part.a, part.b)]
    return causes[0] if causes and None not in causes else None


def _part(a: LazyTensor, b: LazyTensor) -> _Part:
    coded, side = (a, "A") if isinstance(a, BlockScaled) else (b, "B")
    size, scales = _PUBLISHED, None
    if isinstance(coded, BlockScaled):
        size = coded.size
        if coded.height == coded.shape[0]:
            scales = coded.scales.read().float()
    return _Part(a.read().float(), b.read().float(), size, scales, side)


def _cause(part: _Part) -> str | None:
    factors = _block_factors(part.a, part.b, part.size)
    if factors is None or _alike(factors, torch.ones_like(factors)):
        return None
    if part.scales is not None:
        other, ratio = ("B", factors) if part.coded == "A" else ("A", 1 / factors)
        if cause := _misused(part.scales, used=ratio * part.scales, side=other):
            return cause
    bare = [side for side, values in (("A", part.a), ("B", part.b)) if _are_codes(values)]
    if len(bare) == 1:
        return f"fp8 scales missing: {bare[0]} holds the bare codes"
    if _alike(factors, factors.flatten()[:1]):
        return None  # one factor for the whole tensor has a name of its own
    wrong = int(((factors - 1).abs() > _TOLERANCE).sum())
    blocks = f"{wrong} of {factors.numel()} blocks of {part.size.rows} x {part.size.columns}"
    return f"{blocks} scaled by a factor of their own, as wrong fp8 scales leave them"


def _misused(scales: Tensor, used: Tensor, side: str) -> str | None:
    """How one side came from the right scales to the ones that it must have used."""
    one = torch.ones_like(used)
    if _alike(used, one):
        return f"fp8 scales missing: {side} holds the bare codes"
    if _alike(used * scales, one):
        return f"divided by the fp8 scales in {side}, not multiplied"
    if used.shape == scales.T.shape and _alike(used, scales.T):
        return f"fp8 scales transposed in {side}"
    if _alike(used.flatten().sort().values, scales.flatten().sort().values):
        return f"fp8 scales of other blocks in {side}"
    return None


def _block_factors(a: Tensor, b: Tensor, size: BlockSize) -> Tensor | None:
    """b / a for each block; None unless every block has one factor."""
    if a.ndim != 2 or a.shape != b.shape:
        return None
    factors = torch.ones(size.grid(tuple(a.shape)))
    for i in range(factors.shape[0]):
        for j in range(factors.shape[1]):
            block = slice(i * size.rows, (i + 1) * size.rows), slice(j * size.columns, (j + 1) * size.columns)
            left, right = a[block], b[block]
            known = left.abs() > 1e-3 * left.abs().max()
            if not bool(known.any()):
                if bool(right.any()):
                    return None
                continue
            ratios = right[known] / left[known]
            factor = ratios.median()
            if not _alike(ratios, factor):
                return None
            factors[i, j] = factor
    return factors


def _are_codes(values: Tensor) -> bool:
    return torch.equal(values.to(torch.float8_e4m3fn).float(), values)


def _alike(values: Tensor, wanted: Tensor) -> bool:
    return bool(((values - wanted).abs() <= _TOLERANCE * wanted.abs()).all())
