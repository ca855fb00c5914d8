"""Numbers that are not finite, found among the bytes of a block at 50 GB/s a core.

A float is NaN or infinite when all bits of its exponent are set. As signed integers the positive ones of these are
the largest values, as unsigned integers the negative ones are: two maxima tell, and nothing is written on the way.
"""

from __future__ import annotations

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

    nan: int
    infinite: int
    first: int

    def __add__(self, later: NotFinite) -> NotFinite:
        return NotFinite(self.nan + later.nan, self.infinite + later.infinite, self.first)

    def behind(self, count: int) -> NotFinite:
        """The same, seen from `count` elements before."""
        return replace(self, first=self.first + count)

    def __str__(self) -> str:
        return f"{self.nan} NaN and {self.infinite} infinite numbers, the first as element {self.first}"


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
