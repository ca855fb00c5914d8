"""Rows or columns of a tensor picked by number, in any order; nothing is read."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import cast

import torch
from torch import Tensor

from ckptbridge.converters.tensors import LazyTensor, RowMap


class GatheredRows(LazyTensor):
    """Row i is row `numbers[i]` of the base. Made by `gathered_rows`."""

    def __init__(self, base: LazyTensor, numbers: Tensor) -> None:
        self.base, self.numbers = base, numbers
        self.shape, self.dtype = (len(numbers), *base.shape[1:]), base.dtype

    def bases(self) -> Sequence[LazyTensor]:
        return (self.base,)

    def read_rows(self, start: int, stop: int) -> Tensor:
        wanted = self.numbers[start:stop]
        made = torch.empty(stop - start, *self.shape[1:], dtype=self.dtype)
        order = wanted.argsort()
        at = 0
        for first, last in _runs(cast(list[int], wanted[order].tolist())):
            count = last - first
            made[order[at : at + count]] = self.base.read_rows(first, last)
            at += count
        return made

    @property
    def work_row_nbytes(self) -> int:
        return self.base.work_row_nbytes + self.row_nbytes


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Ascending numbers as ranges [first, last), as few as there are; a number that comes twice begins a new one."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return found


def gathered_rows(tensor: LazyTensor, numbers: Tensor) -> LazyTensor:
    """Rows `numbers` of a tensor, in that order; `numbers` is int64."""
    return GatheredRows(tensor, numbers)


def gathered_columns(tensor: LazyTensor, numbers: Tensor) -> LazyTensor:
    """Columns `numbers` of a matrix, in that order; all experts cut from one matrix are made in one pass over it."""
    shape = (tensor.shape[0], len(numbers), *tensor.shape[2:])
    nbytes = prod(shape[1:]) * tensor.dtype.itemsize
    return RowMap(tensor, shape, tensor.dtype, lambda rows: rows[:, numbers], nbytes)
