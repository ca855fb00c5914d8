"""A checkpoint is a mapping from names to tensors that have not been read yet.

A lazy tensor knows its shape and dtype, reads any range of its rows, and says where its bytes lie when
they only have to be moved. Cutting, joining and padding along rows keep that knowledge, so a converted
tensor is still a list of byte ranges of the source files; casting and scaling give it up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.reading import read_exactly, read_strided


@dataclass(frozen=True, slots=True)
class Extent:
    """`nbytes` bytes at `offset` of `path`; a path of None stands for zeros."""

    path: Path | None
    offset: int
    nbytes: int


class LazyTensor(ABC):
    """A tensor that is described now and read later. Rows are indices of dim 0."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @abstractmethod
    def read_rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) as a contiguous CPU tensor of shape (stop - start, *shape[1:])."""

    def read_block(self, start: int, stop: int, first: int, last: int) -> Tensor:
        """Columns [first, last) of rows [start, stop); whoever can reads no other bytes."""
        return self.read_rows(start, stop)[:, first:last]

    def extents(self) -> Sequence[Extent] | None:
        """Where the bytes lie, in order, when the tensor is nothing but a sequence of stored bytes."""
        return None

    def bases(self) -> Sequence[LazyTensor]:
        """The tensors that this one is made of; none for one that reads a file itself, or that says nothing."""
        return ()

    def read(self) -> Tensor:
        """The whole tensor."""
        return self.read_rows(0, self.shape[0]) if self.shape else self.read_rows(0, 1).reshape(())

    def cast(self, dtype: torch.dtype) -> LazyTensor:
        """The tensor in another dtype; see the function `cast`."""
        extra = prod(self.shape[1:]) * dtype.itemsize
        return RowMap(self, self.shape, dtype, lambda rows: rows.to(dtype), extra, is_elementwise=True)

    def columns(self, start: int, stop: int) -> LazyTensor:
        """Some columns of a tensor; see the function `columns`."""
        return Columns(self, start, stop)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def row_nbytes(self) -> int:
        return prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def work_row_nbytes(self) -> int:
        """The memory that reading one row takes, what is thrown away included."""
        return self.row_nbytes

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.shape)}, {self.dtype})"


Checkpoint = Mapping[str, LazyTensor]


class Stored(LazyTensor):
    """A contiguous tensor in a file: its bytes begin at `offset`."""

    def __init__(self, path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.path, self.offset, self.shape, self.dtype = path, offset, shape, dtype

    def read_rows(self, start: int, stop: int) -> Tensor:
        shape = (stop - start, *self.shape[1:])
        buffer = torch.empty(shape, dtype=self.dtype)
        if buffer.numel():
            read_exactly(self.path, self.offset + start * self.row_nbytes, _bytes_of(buffer))
        return buffer

    def read_block(self, start: int, stop: int, first: int, last: int) -> Tensor:
        buffer = torch.empty((stop - start, last - first, *self.shape[2:]), dtype=self.dtype)
        if buffer.numel():
            at = self.offset + start * self.row_nbytes + first * (self.row_nbytes // self.shape[1])
            read_strided(self.path, at, self.row_nbytes, stop - start, _bytes_of(buffer))
        return buffer

    def extents(self) -> Sequence[Extent]:
        return (Extent(self.path, self.offset, self.nbytes),)


class InMemory(LazyTensor):
    """A tensor that is already here (a trained weight, a test's input)."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.shape, self.dtype = tensor.detach(), tuple(tensor.shape), tensor.dtype

    def read_rows(self, start: int, stop: int) -> Tensor:
        rows = self.tensor[start:stop] if self.shape else self.tensor.reshape(1)
        return rows.cpu().contiguous()


class Computed(LazyTensor):
    """A tensor made by a function of a row range: a drawn router, a stack of experts."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        rows: Callable[[int, int], Tensor],
        work_row_nbytes: int | None = None,
    ) -> None:
        self.shape, self.dtype, self._rows, self._work = shape, dtype, rows, work_row_nbytes

    def read_rows(self, start: int, stop: int) -> Tensor:
        return self._rows(start, stop).contiguous()

    @property
    def work_row_nbytes(self) -> int:
        return self._work or self.row_nbytes


class RowMap(LazyTensor):
    """Each row is a function of one other tensor's same row: its columns, the row cast or scaled.

    Several of one base are made in one pass over it. `extra_nbytes` is the memory a row takes beside the base's.
    Of an elementwise function some columns can be had without the others.
    """

    def __init__(
        self,
        base: LazyTensor,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        function: Callable[[Tensor], Tensor],
        extra_nbytes: int,
        *,
        is_elementwise: bool = False,
    ) -> None:
        self.base, self.shape, self.dtype, self.function = base, shape, dtype, function
        self.extra_nbytes, self.is_elementwise = extra_nbytes, is_elementwise

    def bases(self) -> Sequence[LazyTensor]:
        return (self.base,)

    def read_rows(self, start: int, stop: int) -> Tensor:
        return self.function(self.base.read_rows(start, stop)).contiguous()

    def read_block(self, start: int, stop: int, first: int, last: int) -> Tensor:
        if not self.is_elementwise:
            return super().read_block(start, stop, first, last)
        return self.function(self.base.read_block(start, stop, first, last))

    @property
    def work_row_nbytes(self) -> int:
        return self.base.work_row_nbytes + self.extra_nbytes


class Columns(RowMap):
    """Columns [first, last) of another tensor. Made by `columns`."""

    def __init__(self, base: LazyTensor, first: int, last: int) -> None:
        shape = (base.shape[0], last - first, *base.shape[2:])
        nbytes = prod(shape[1:]) * base.dtype.itemsize
        super().__init__(base, shape, base.dtype, lambda rows: rows[:, first:last], nbytes)
        self.first = first

    def read_rows(self, start: int, stop: int) -> Tensor:
        return self.read_block(start, stop, 0, self.shape[1]).contiguous()

    def read_block(self, start: int, stop: int, first: int, last: int) -> Tensor:
        return self.base.read_block(start, stop, self.first + first, self.first + last)


class Beside(LazyTensor):
    """Tensors side by side along dim 1. Made by `join_columns`."""

    def __init__(self, parts: Sequence[LazyTensor]) -> None:
        first = parts[0]
        self.parts, self.dtype = parts, first.dtype
        self.shape = (first.shape[0], sum(part.shape[1] for part in parts), *first.shape[2:])

    def bases(self) -> Sequence[LazyTensor]:
        return self.parts

    def read_rows(self, start: int, stop: int) -> Tensor:
        whole = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        at = 0
        for part in self.parts:
            whole[:, at : at + part.shape[1]] = part.read_rows(start, stop)
            at += part.shape[1]
        return whole

    @property
    def work_row_nbytes(self) -> int:
        return self.row_nbytes + max(part.work_row_nbytes for part in self.parts)


class Zeros(LazyTensor):
    """Rows that exist in no file: vocabulary padding, a shared expert that adds nothing."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype

    def read_rows(self, start: int, stop: int) -> Tensor:
        return torch.zeros(stop - start, *self.shape[1:], dtype=self.dtype)

    def extents(self) -> Sequence[Extent]:
        return (Extent(None, 0, self.nbytes),)


class Rows(LazyTensor):
    """Row ranges of other tensors, one after the other. Made by `rows` and `join_rows`."""

    def __init__(
        self, pieces: Sequence[tuple[LazyTensor, int, int]], tail: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self.pieces, self.dtype = pieces, dtype
        self.shape = (sum(stop - start for _, start, stop in pieces), *tail)

    @cached_property
    def _starts(self) -> list[int]:
        starts = [0]
        for _, start, stop in self.pieces:
            starts.append(starts[-1] + stop - start)
        return starts

    def cut(self, start: int, stop: int) -> Iterator[tuple[LazyTensor, int, int]]:
        """The pieces that rows [start, stop) of this tensor are made of."""
        for i in range(max(bisect_right(self._starts, start) - 1, 0), len(self.pieces)):
            at, (base, first, last) = self._starts[i], self.pieces[i]
            if at >= stop:
                return
            low, high = max(start - at, 0), min(stop - at, last - first)
            if low < high:
                yield base, first + low, first + high

    def bases(self) -> Sequence[LazyTensor]:
        return tuple({id(base): base for base, _, _ in self.pieces}.values())

    def read_rows(self, start: int, stop: int) -> Tensor:
        parts = [base.read_rows(low, high) for base, low, high in self.cut(start, stop)]
        if not parts:
            return torch.empty(0, *self.shape[1:], dtype=self.dtype)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def read_block(self, start: int, stop: int, first: int, last: int) -> Tensor:
        parts = [base.read_block(low, high, first, last) for base, low, high in self.cut(start, stop)]
        return torch.cat(parts) if parts else torch.empty(0, last - first, *self.shape[2:], dtype=self.dtype)

    def cast(self, dtype: torch.dtype) -> LazyTensor:
        made = {id(base): cast(base, dtype) for base, _, _ in self.pieces}
        pieces = [(made[id(base)], start, stop) for base, start, stop in self.pieces]
        return Rows(pieces, self.shape[1:], dtype)

    @property
    def work_row_nbytes(self) -> int:
        return max((base.work_row_nbytes for base, _, _ in self.pieces), default=0) + self.row_nbytes

    def extents(self) -> Sequence[Extent] | None:
        found: list[Extent] = []
        whole: dict[int, Sequence[Extent] | None] = {}
        for base, start, stop in self.pieces:
            if id(base) not in whole:
                whole[id(base)] = base.extents()
            extents = whole[id(base)]
            if extents is None or len(extents) != 1:  # bases are never Rows, so a base that moves is one range
                return None
            path, offset, nbytes = (
                extents[0].path,
                extents[0].offset + start * self.row_nbytes,
                (stop - start) * self.row_nbytes,
            )
            last = found[-1] if found else None
            if last and last.path == path and (path is None or last.offset + last.nbytes == offset):
                found[-1] = Extent(path, last.offset, last.nbytes + nbytes)
            else:
                found.append(Extent(path, offset if path else 0, nbytes))
        return found


def rows(tensor: LazyTensor, start: int, stop: int) -> LazyTensor:
    """Rows [start, stop) of a tensor, nothing read."""
    if (start, stop) == (0, tensor.shape[0]):
        return tensor
    if isinstance(tensor, Rows) or not 0 <= start <= stop <= tensor.shape[0]:
        return join_rows([tensor], [(start, stop)])
    return Rows([(tensor, start, stop)], tensor.shape[1:], tensor.dtype)


def join_rows(tensors: Sequence[LazyTensor], ranges: Sequence[tuple[int, int]] | None = None) -> LazyTensor:
    """Tensors (or a row range of each) stacked along dim 0. Raises BadInputError if widths or dtypes differ."""
    first = tensors[0]
    pieces: list[tuple[LazyTensor, int, int]] = []
    for tensor, (start, stop) in zip(tensors, ranges or [(0, t.shape[0]) for t in tensors], strict=True):
        if tensor.shape[1:] != first.shape[1:] or tensor.dtype != first.dtype:
            raise BadInputError(f"cannot join {first!r} and {tensor!r}: widths or dtypes differ")
        if not 0 <= start <= stop <= tensor.shape[0]:
            raise BadInputError(f"rows {start} to {stop} do not lie within {tensor!r}")
        new = tensor.cut(start, stop) if isinstance(tensor, Rows) else [(tensor, start, stop)]
        for base, low, high in new:
            if pieces and pieces[-1][0] is base and pieces[-1][2] == low:
                pieces[-1] = (base, pieces[-1][1], high)
            else:
                pieces.append((base, low, high))
    if len(pieces) == 1 and pieces[0][1:] == (0, pieces[0][0].shape[0]):
        return pieces[0][0]
    return Rows(pieces, first.shape[1:], first.dtype)


def columns(tensor: LazyTensor, start: int, stop: int) -> LazyTensor:
    """Columns [start, stop) of dim 1: bytes no longer lie together, so rows are read and cut."""
    if (start, stop) == (0, tensor.shape[1]):
        return tensor
    return tensor.columns(start, stop)


def join_columns(tensors: Sequence[LazyTensor]) -> LazyTensor:
    """Tensors side by side along dim 1."""
    return tensors[0] if len(tensors) == 1 else Beside(tensors)


def reshaped(tensor: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    """The same elements in another shape that keeps the rows whole or splits them evenly."""
    if shape == tensor.shape:
        return tensor
    if isinstance(tensor, Stored):
        return Stored(tensor.path, tensor.offset, shape, tensor.dtype)
    if isinstance(tensor, Zeros):
        return Zeros(shape, tensor.dtype)
    if isinstance(tensor, Reshaped):
        return reshaped(tensor.tensor, shape)
    return Reshaped(tensor, shape)


class Reshaped(LazyTensor):
    """The same bytes as another tensor. If its rows are no whole rows of that, it is read whole for each part."""

    def __init__(self, tensor: LazyTensor, shape: tuple[int, ...]) -> None:
        self.tensor, self.shape, self.dtype = tensor, shape, tensor.dtype

    def bases(self) -> Sequence[LazyTensor]:
        return (self.tensor,)

    def extents(self) -> Sequence[Extent] | None:
        return self.tensor.extents()

    def read_rows(self, start: int, stop: int) -> Tensor:
        wide, narrow = prod(self.shape[1:]), prod(self.tensor.shape[1:])
        if not self.shape or not narrow or wide % narrow:
            return self.tensor.read().reshape(self.shape)[start:stop]
        count = wide // narrow
        return self.tensor.read_rows(start * count, stop * count).reshape(stop - start, *self.shape[1:])


def cast(tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    """The tensor in another dtype, rounded to nearest; one that is computed is rounded once, not twice."""
    return tensor if dtype == tensor.dtype else tensor.cast(dtype)


def scaled(tensor: LazyTensor, factor: float) -> LazyTensor:
    """The tensor times a number, computed in fp32 and rounded once. A power of two loses nothing."""
    if factor == 1.0:
        return tensor
    dtype, extra = tensor.dtype, 2 * prod(tensor.shape[1:]) * 4 + tensor.row_nbytes
    return RowMap(
        tensor, tensor.shape, dtype, lambda rows: (rows.float() * factor).to(dtype), extra, is_elementwise=True
    )


def _bytes_of(tensor: Tensor) -> memoryview:
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
