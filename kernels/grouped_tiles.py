"""Tiles over rows that are sorted by expert: which rows each covers, and how to touch them and no others.

How many rows an expert has is known to the device alone, so a small kernel writes the list of tiles there.

A copy-engine descriptor clips at the end of its tensor, not at the end of an expert. The ragged descriptor gets the
latter from the former: it claims 2**30 rows and has two further dimensions, whose coordinates move the start. A row
that lies n before the expert's end is asked for as row 2**30 - n, so that rows behind the end lie behind the
descriptor's own. The step of the first further dimension takes 2**30 rows back: addresses wrap around at 2**64.
"""

# Shapes: R routed rows, E experts.

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from ckptbridge.kernels.backend import jit, tl
from ckptbridge.kernels.grouped_config import GroupedConfig

CLAIMED_ROWS = 2**30
_WIDE = 2**31 - 2**16  # any coordinate fits
ENTRY = 4  # int32 of a table entry: expert, first row, the row behind the expert's last; one spare


def fits_descriptor(tensor: Tensor) -> bool:
    """Whether the copy engine can read and write `tensor`: it asks for addresses and rows of 16 bytes."""
    return tensor.data_ptr() % 16 == 0 and tensor.shape[-1] * tensor.element_size() % 16 == 0 and tensor.numel() > 0


def descriptor(tensor: Tensor, block: list[int]) -> Any:
    """A copy-engine descriptor of a contiguous tensor, by tiles of `block`."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)


def ragged_descriptor(rows: Tensor, block: list[int]) -> Any:
    """One of a contiguous [R, columns], for `load_rows` and `store_rows`."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    R, columns = rows.shape
    if R > CLAIMED_ROWS:
        raise ValueError(f"grouped product: expected at most 2**30 rows, found {R}")
    strides = [2**34 - columns, columns, columns, 1]
    return TensorDescriptor(rows, [_WIDE, _WIDE, CLAIMED_ROWS, columns], strides, [1, 1, *block])


@jit
def load_rows(ragged, row, end, column):
    """The tile at (row, column) with zeros from row `end` on; `end` itself may be the buffer's end, not `row`."""
    tile = ragged.load([1073741824, end, 1073741824 - (end - row), column])
    return tl.reshape(tile, [tile.shape[2], tile.shape[3]])


@jit
def store_rows(ragged, row, end, column, tile):
    """Write those rows of a tile at (row, column) that lie before `end`."""
    ragged.store(
        [1073741824, end, 1073741824 - (end - row), column], tl.reshape(tile, [1, 1, tile.shape[0], tile.shape[1]])
    )


def hopper_kernels(config: GroupedConfig, *tensors: Tensor) -> ModuleType | None:
    """The kernels in Gluon, if `config` asks for them and they can compute a product of `tensors`."""
    if config.engine != "gluon" or tensors[0].device.type != "cuda":
        return None
    from ckptbridge.kernels import grouped_hopper  # here: a Triton without Gluon has all the others

    return grouped_hopper if grouped_hopper.fits(config, *tensors) else None


def most_row_tiles(R: int, E: int, block_rows: int) -> int:
    """How many tiles there are at most, however R rows are spread: each expert's last one may be cut short."""
    return R // block_rows + E


def tile_table(ends_E: Tensor, R: int, block_rows: int) -> Tensor:
    """int32 [1 + most tiles there can be, ENTRY]: the number of tiles, then each tile's expert, first row and end."""
    E = len(ends_E)
    table = ends_E.new_empty(1 + most_row_tiles(R, E, block_rows), ENTRY)
    _table_kernel[(E,)](ends_E, table, E=E, BLOCK_E=max(2, 1 << (E - 1).bit_length()), BLOCK_R=block_rows, num_warps=1)
    return table


@jit
def _table_kernel(ends_ptr, table_ptr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr):
    expert = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    end = tl.load(ends_ptr + experts, mask=experts < E, other=0)
    start = tl.load(ends_ptr + experts - 1, mask=(experts > 0) & (experts < E), other=0)
    tiles = (end - start + BLOCK_R - 1) // BLOCK_R
    before = tl.sum(tl.where(experts < expert, tiles, 0))
    mine = tl.sum(tl.where(experts == expert, tiles, 0))
    first_row = tl.sum(tl.where(experts == expert, start, 0))
    last_row = tl.sum(tl.where(experts == expert, end, 0))
    if expert == E - 1:
        tl.store(table_ptr, before + mine)
    for tile in range(mine):
        entry = table_ptr + (1 + before + tile) * 4
        tl.store(entry, expert)
        tl.store(entry + 1, first_row + tile * BLOCK_R)
        tl.store(entry + 2, last_row)


@jit
def grouped_place(tile, num_row_tiles, NUM_COLUMN_TILES: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of a tile, GROUP rows of tiles at a time: programs that run side by side share what they read."""
    width = GROUP * NUM_COLUMN_TILES
    first_row_tile = (tile // width) * GROUP
    height = tl.minimum(num_row_tiles - first_row_tile, GROUP)
    within = tile % width
    return first_row_tile + within % height, within // height


@jit
def multiply_add(a, b, sums, INTERPRETED: tl.constexpr):
    """sums + a @ b. The interpreter (Triton 3.9) multiplies bf16 as if the bits were integers, so it gets fp32."""
    if INTERPRETED:
        sums = tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    else:
        sums = tl.dot(a, b, sums)
    return sums


@jit
def _halves(tile):
    pairs = tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2])
    return tl.split(tl.permute(pairs, [0, 2, 1]))


@jit
def parts_of(tile, PARTS: tl.constexpr):
    """A tile cut into 1, 2 or 4 blocks of columns, from left to right."""
    if PARTS == 1:
        parts = (tile,)
    elif PARTS == 2:
        parts = _halves(tile)
    else:
        left, right = _halves(tile)
        first, second = _halves(left)
        third, fourth = _halves(right)
        parts = (first, second, third, fourth)
    return parts
