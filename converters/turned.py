"""Matrices whose rows and columns are exchanged, and matrices whose rows take turns; nothing is read.

Some families store an expert as [inputs, outputs] and its gate_proj and up_proj as columns in turn.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from ckptbridge.converters.tensors import LazyTensor

_CHUNK_NBYTES = 1 << 20
BAND_NBYTES = 16 << 20
"""What a thread keeps: half an expert of GPT-OSS, whose matrices are read twice."""


class _Band(threading.local):
    """Rows of the turned matrix that a thread made last: it asks for them a few at a time, in order."""

    owner: LazyTensor | None = None
    start = 0
    rows = torch.empty(0)


_band = _Band()


class Turned(LazyTensor):
    """A matrix with rows and columns exchanged. Made by `turned`.

    Each thread keeps 16 MiB of rows, so that the other matrix, of which all rows are needed for any row here, is read
    once for so many and not for each block.
    """

    def __init__(self, base: LazyTensor) -> None:
        self.base, self.shape, self.dtype = base, (base.shape[1], base.shape[0]), base.dtype

    def bases(self) -> Sequence[LazyTensor]:
        return (self.base,)

    def read_rows(self, start: int, stop: int) -> Tensor:
        if start >= stop or not self.row_nbytes:
            return torch.empty(stop - start, self.shape[1], dtype=self.dtype)
        if _band.owner is not self or start < _band.start or stop > _band.start + len(_band.rows):
            _band.owner, _band.rows = None, torch.empty(0)  # before the next one takes memory
            end = min(self.shape[0], max(stop, start + BAND_NBYTES // self.row_nbytes))
            _band.rows = self._made(start, end)
            _band.owner, _band.start = self, start
        return _band.rows[start - _band.start : stop - _band.start].clone()

    def _made(self, start: int, stop: int) -> Tensor:
        made = torch.empty(stop - start, self.shape[1], dtype=self.dtype)
        step = max(1, _CHUNK_NBYTES // max(1, self.base.work_row_nbytes))
        for at in range(0, self.shape[1], step):
            end = min(self.shape[1], at + step)
            made[:, at:end] = self.base.read_rows(at, end)[:, start:stop].T
        return made

    @property
    def work_row_nbytes(self) -> int:
        return 2 * self.row_nbytes


class EveryNth(LazyTensor):
    """Rows `first`, `first + step`, `first + 2 * step`, ... of a tensor."""

    def __init__(self, base: LazyTensor, first: int, step: int) -> None:
        self.base, self.first, self.step, self.dtype = base, first, step, base.dtype
        self.shape = (base.shape[0] // step, *base.shape[1:])

    def bases(self) -> Sequence[LazyTensor]:
        return (self.base,)

    def read_rows(self, start: int, stop: int) -> Tensor:
        first = self.first + start * self.step
        last = first + (stop - start - 1) * self.step + 1 if stop > start else first
        return self.base.read_rows(first, last)[:: self.step].contiguous()

    @property
    def work_row_nbytes(self) -> int:
        return self.step * self.base.work_row_nbytes + self.row_nbytes


class InTurn(LazyTensor):
    """Tensors of one shape whose rows take turns: the first of each, the second of each, ..."""

    def __init__(self, parts: Sequence[LazyTensor]) -> None:
        self.parts, self.dtype = parts, parts[0].dtype
        self.shape = (len(parts) * parts[0].shape[0], *parts[0].shape[1:])

    def bases(self) -> Sequence[LazyTensor]:
        return self.parts

    def read_rows(self, start: int, stop: int) -> Tensor:
        whole = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        count = len(self.parts)
        for number, part in enumerate(self.parts):
            low, high = (-(-(edge - number) // count) for edge in (start, stop))
            whole[low * count + number - start :: count] = part.read_rows(low, high)
        return whole

    @property
    def work_row_nbytes(self) -> int:
        return self.row_nbytes + max(part.work_row_nbytes for part in self.parts)


def turned(tensor: LazyTensor) -> LazyTensor:
    """A matrix with rows and columns exchanged; twice is the matrix itself."""
    return tensor.base if isinstance(tensor, Turned) else Turned(tensor)
