"""Optimizer tensors in the form `fully_sharded_model_space`: tensor-parallel slices lie flat, in a grid.

megatron-core up to 0.14 saved a tensor [X, Y] whose slices are [x, y] as [X / x, Y / y, x * y], the last axis cut as
the data-parallel ranks happened to own it (dist_checkpointing/strategies/torch.py says so to this day, and refuses to
write it). Leading axes of layers and experts are slices of one entry each.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import TYPE_CHECKING

from torch import Tensor

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.tensors import Extent, LazyTensor, join_columns, join_rows, rows

if TYPE_CHECKING:
    from ckptbridge.converters.mcore.torch_dist_reader import GlobalTensor


def is_grid(whole: GlobalTensor, axes: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a grid of flat slices: it has one axis more than what it should hold."""
    return len(whole.shape) == len(axes) + len(shape) + 1 and whole.shape[: len(axes)] == axes


def from_grid(whole: GlobalTensor, index: tuple[int, ...], shape: tuple[int, ...], most_padding: int) -> LazyTensor:
    """Entry `index` of the leading axes put together from its slices; of a vocabulary, `shape` is without padding.

    `most_padding` is the number of rows beyond `shape` from which on they are no padding. Raises BadInputError when the
    slices do not add up to the shape.
    """
    grid, numel = whole.shape[len(index) : -1], whole.shape[-1]
    if not all(grid) or any(n % cells for n, cells in zip(shape[1:], grid[1:], strict=True)):
        raise _misfit(whole, shape)
    tail = tuple(n // cells for n, cells in zip(shape[1:], grid[1:], strict=True))
    held = numel // max(1, prod(tail))
    if held * prod(tail) != numel or not 0 <= grid[0] * held - shape[0] < most_padding:
        raise _misfit(whole, shape)
    bands: list[LazyTensor] = []
    for row in range(grid[0]):
        cells = [
            Folded(whole.part((*index, row, *at)), (held, *tail))
            for at in product(*(range(count) for count in grid[1:]))
        ]
        bands.append(join_columns(cells))
    return rows(join_rows(bands), 0, shape[0])


def _misfit(whole: GlobalTensor, shape: tuple[int, ...]) -> BadInputError:
    return BadInputError(f"{whole.key}: slices of shape {list(whole.shape)} do not add up to {list(shape)}")


class Folded(LazyTensor):
    """A flat tensor as rows."""

    def __init__(self, flat: LazyTensor, shape: tuple[int, ...]) -> None:
        self.flat, self.shape, self.dtype = flat, shape, flat.dtype

    def read_rows(self, start: int, stop: int) -> Tensor:
        width = prod(self.shape[1:])
        return self.flat.read_rows(start * width, stop * width).reshape(stop - start, *self.shape[1:])

    def extents(self) -> Sequence[Extent] | None:
        return self.flat.extents()
