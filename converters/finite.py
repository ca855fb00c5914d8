"""Numbers that are not finite, found among the bytes of a block at 50 GB/s a core.

A float is NaN or infinite when all bits of its exponent are set. As signed integers the positive ones of these are
the largest values, as unsigned integers the negative ones are: two maxima tell, and nothing is written on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

_INFINITY = {
    torch.bfloat16: (np.int16, np.uint16, 0x7F80),
    torch.float16: (np.int16, np.uint16, 0x7C00),
    torch.float32: (np.int32, np.uint32, 0x7F800000),
    torch.float64: (np.int64, np.uint64, 0x7FF0000000000000),
    torch.float8_e5m2: (np.int8, np.uint8, 0x7C),
    torch.float8_e4m3fn: (np.int8, np.uint8, 0x7F),
}
"""A dtype's numbers as integers, and which of them is infinity; e4m3fn has none, and NaN in its place."""


@dataclass(frozen=True, slots=True)
class NotFinite:
    """How many NaN and infinities there are, and which element (of the flattened tensor) is the first."""

    nan: int = 0
    infinite: int = 0
    first: int = 0
    overflowed: int = 0
    """Numbers that are finite, and infinite in the dtype that is written."""
    largest: float = 0.0
    """The largest magnitude among these."""

    def __add__(self, later: NotFinite) -> NotFinite:
        return NotFinite(self.nan + later.nan, self.infinite + later.infinite, self.first)

    def behind(self, count: int) -> NotFinite:
        """The same, seen from `count` elements before."""
        return replace(self, first=self.first + count)

    def merged(self, other: NotFinite) -> NotFinite:
        """What two ranks, or two runs, found in the same tensor: neither need have seen the whole of it."""
        return NotFinite(
            nan=max(self.nan, other.nan),
            infinite=max(self.infinite, other.infinite),
            first=self.first if self.nan + self.infinite >= other.nan + other.infinite else other.first,
            overflowed=max(self.overflowed, other.overflowed),
            largest=max(self.largest, other.largest),
        )

    def counts(self) -> dict[str, int]:
        """What a receipt says of it."""
        return {"nan": self.nan, "infinite": self.infinite} | (
            {"overflowed": self.overflowed} if self.overflowed else {}
        )

    def __str__(self) -> str:
        told: list[str] = []
        if self.nan or self.infinite:
            told.append(f"{self.nan} NaN and {self.infinite} infinite numbers, the first as element {self.first}")
        if self.overflowed:
            told.append(
                f"{self.overflowed} finite numbers that are infinite in the dtype asked for, the largest "
                f"{self.largest:.6g}"
            )
        return "; ".join(told)


def not_finite(block: memoryview, dtype: torch.dtype) -> NotFinite | None:
    """What is not finite among whole elements of a dtype; None for nothing, and for a dtype that has no infinity."""
    if dtype not in _INFINITY or not len(block):
        return None
    signed, unsigned, infinity = _INFINITY[dtype]
    bits: Any = np.frombuffer(block, unsigned)
    sign = 1 << (8 * dtype.itemsize - 1)
    if int(bits.view(signed).max()) < infinity and int(bits.max()) < sign + infinity:
        return None
    magnitude = bits & unsigned(sign - 1)
    bad = magnitude >= infinity
    count, infinite = int(np.count_nonzero(bad)), int(np.count_nonzero(magnitude == infinity))
    if dtype == torch.float8_e4m3fn:
        infinite = 0
    return NotFinite(nan=count - infinite, infinite=infinite, first=int(np.argmax(bad)))


def finite_notes(found: Mapping[str, NotFinite]) -> tuple[str, ...]:
    """What a receipt says of these tensors: those that are not finite, and those that the dtype cannot hold."""
    bad = {name: one for name, one in found.items() if one.nan or one.infinite}
    lost = {name: one for name, one in found.items() if one.overflowed}
    notes: list[str] = []
    if bad:
        notes.append(
            f"{len(bad)} tensors of the source hold numbers that are not finite, and so does the result: {_first(bad)}"
        )
    if lost:
        notes.append(
            f"{len(lost)} tensors hold numbers that are finite in the source and infinite in the result: "
            f"{_first(lost)}; bf16 and fp32 hold them (--dtype)"
        )
    return tuple(notes)


def _first(found: Mapping[str, NotFinite]) -> str:
    return "; ".join(f"{name}: {one}" for name, one in list(found.items())[:3])
