"""Matrices whose rows and columns are exchanged, and matrices whose rows take turns; nothing is read.

Some families store an expert as [inputs, outputs] and its gate_proj and up_proj as columns in turn. Rows of such a
tensor lie scattered over all rows of the other, so of each only the columns that are asked for are read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ckptbridge.converters.tensors import Beside, Cast, InMemory, LazyTensor, Rows, Stored, read_exactly

_CHUNK_NBYTES = 1 << 20
"""What is read at a time of a tensor that can be read by whole rows only."""


class Turned(LazyTensor):
    """A matrix with rows and columns exchanged. Made by `turned`."""

    def __init__(self, base: LazyTensor) -> None:
        self.base, self.shape, self.dtype = base, (base.shape[1], base.shape[0]), base.dtype

    def bases(self) -> Sequence[LazyTensor]:
        return (self.base,)

    def read_rows(self, start: int, stop: int) -> Tensor:
        return read_box(self.base, (0, self.base.shape[0]), (start, stop)).T.contiguous()

    @property
    def work_row_nbytes(self) -> int:
        return 3 * self.row_nbytes


class EveryNth(LazyTensor):
    """Rows `first`, `first + step`, `first + 2 * step`, ... of a tensor."""

    def __init__(self, base: LazyTensor, first: int, step: int) -> None:
        self.base, self.first, self.step, self.dtype = base, first, step, base.dtype
        self.shape = (base.shape[0] // step, *base.shape[1:])

    def bases(self) -> Sequence[LazyTensor]:
        return (self.base,)

    def read_rows(self, start: int, stop: int) -> Tensor:
        return self.base.read_rows(*self.span(start, stop))[:: self.step].contiguous()

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """The rows of the base among which rows [start, stop) of this tensor are."""
        return self.first + start * self.step, self.first + max(start, stop - 1) * self.step + (stop > start)

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
        return self._filled(start, stop, self.shape[1:], None)

    def read_columns(self, start: int, stop: int, columns: tuple[int, int]) -> Tensor:
        """Rows [start, stop), of them these columns alone."""
        return self._filled(start, stop, (columns[1] - columns[0],), columns)

    def _filled(self, start: int, stop: int, tail: tuple[int, ...], columns: tuple[int, int] | None) -> Tensor:
        whole = torch.empty((stop - start, *tail), dtype=self.dtype)
        count = len(self.parts)
        for number, part in enumerate(self.parts):
            low, high = (-(-(edge - number) // count) for edge in (start, stop))
            found = part.read_rows(low, high) if columns is None else read_box(part, (low, high), columns)
            whole[low * count + number - start :: count] = found
        return whole

    @property
    def work_row_nbytes(self) -> int:
        return self.row_nbytes + max(part.work_row_nbytes for part in self.parts)


def turned(tensor: LazyTensor) -> LazyTensor:
    """A matrix with rows and columns exchanged; twice is the matrix itself."""
    return tensor.base if isinstance(tensor, Turned) else Turned(tensor)


def read_box(tensor: LazyTensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """Some columns of some rows of a matrix, and as little else as its form allows."""
    (start, stop), (low, high) = rows, columns
    if (low, high) == (0, tensor.shape[1]):
        return tensor.read_rows(start, stop)
    if isinstance(tensor, Stored):
        return _read_strided(tensor, rows, columns)
    if isinstance(tensor, InMemory):
        return tensor.tensor[start:stop, low:high].cpu()
    if isinstance(tensor, Cast):
        return read_box(tensor.base, rows, columns).to(tensor.dtype)
    if isinstance(tensor, Turned):
        return read_box(tensor.base, columns, rows).T
    if isinstance(tensor, EveryNth):
        return read_box(tensor.base, tensor.span(start, stop), columns)[:: tensor.step]
    if isinstance(tensor, InTurn):
        return tensor.read_columns(start, stop, columns)
    if isinstance(tensor, Rows):
        parts = [read_box(base, (first, last), columns) for base, first, last in tensor.cut(start, stop)]
        return torch.cat(parts) if parts else torch.empty(0, high - low, dtype=tensor.dtype)
    if isinstance(tensor, Beside):
        return _read_beside(tensor, rows, columns)
    made = torch.empty(stop - start, high - low, dtype=tensor.dtype)
    step = max(1, _CHUNK_NBYTES // max(1, tensor.work_row_nbytes))
    for at in range(start, stop, step):
        end = min(stop, at + step)
        made[at - start : end - start] = tensor.read_rows(at, end)[:, low:high]
    return made


def _read_strided(tensor: Stored, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    found = torch.empty(rows[1] - rows[0], columns[1] - columns[0], dtype=tensor.dtype)
    if not found.numel():
        return found
    first = tensor.offset + rows[0] * tensor.row_nbytes + columns[0] * tensor.dtype.itemsize
    for number, into in enumerate(found.view(torch.uint8).numpy()):
        read_exactly(tensor.path, first + number * tensor.row_nbytes, memoryview(into))
    return found


def _read_beside(tensor: Beside, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    made: list[Tensor] = []
    at = 0
    for part in tensor.parts:
        low, high = max(columns[0] - at, 0), min(columns[1] - at, part.shape[1])
        if low < high:
            made.append(read_box(part, rows, (low, high)))
        at += part.shape[1]
    return torch.cat(made, dim=1) if made else torch.empty(rows[1] - rows[0], 0, dtype=tensor.dtype)
