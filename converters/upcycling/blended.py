"""A weighted mean of tensors of one shape, computed as rows are read: models that are averaged, experts that merge."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.tensors import LazyTensor


class Blend(LazyTensor):
    """The sum of each part times its weight, over the weights' sum. Made by `blended`.

    It is computed with at least twice the parts' digits and rounded at the end: equal parts give the same bits again.
    """

    def __init__(self, parts: Sequence[LazyTensor], weights: Sequence[float], dtype: torch.dtype) -> None:
        self.parts, self.weights, self.shape, self.dtype = parts, weights, parts[0].shape, dtype
        self._wide = torch.float32 if parts[0].dtype.itemsize < 4 else torch.float64

    def bases(self) -> Sequence[LazyTensor]:
        return self.parts

    def read_rows(self, start: int, stop: int) -> Tensor:
        made = torch.zeros(stop - start, *self.shape[1:], dtype=self._wide)
        for part, weight in zip(self.parts, self.weights, strict=True):
            made.add_(part.read_rows(start, stop).to(self._wide), alpha=weight)
        return made.div_(sum(self.weights)).to(self.dtype)

    def cast(self, dtype: torch.dtype) -> LazyTensor:
        return Blend(self.parts, self.weights, dtype)

    @property
    def work_row_nbytes(self) -> int:
        wide = 2 * prod(self.shape[1:]) * self._wide.itemsize
        return self.row_nbytes + wide + max(part.work_row_nbytes for part in self.parts)


def blended(parts: Sequence[LazyTensor], weights: Sequence[float] | None = None) -> LazyTensor:
    """The mean of the parts, by their weights if there are any. A single part stays what it is.

    Weights are from 0, and not all 0. Raises BadInputError if shapes or dtypes differ.
    """
    first = parts[0]
    for part in parts:
        if part.shape != first.shape or part.dtype != first.dtype:
            raise BadInputError(f"cannot blend {first!r} and {part!r}: shapes or dtypes differ")
    return first if len(parts) == 1 else Blend(parts, weights or [1.0] * len(parts), first.dtype)
