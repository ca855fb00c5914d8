"""The weight gradient of a grouped product, summed in fp32 into memory that persists: the Triton kernel.

Each tile of an expert's [O, I] sums over the expert's rows. The ragged descriptors read zeros behind the expert's last
row, so the loop needs no mask, and an expert without rows gets a chunk of zeros. A tile is added to what is there by
the copy engine on its way out: one program owns it, so the sum does not depend on any order.

Tiles that are written and not added to can be squared and summed while they are in registers. The gradient's norm,
which clipping needs before any weight changes, then has no need to read 4 bytes a parameter again.
"""

# Shapes: R routed rows, E experts, O the columns of d (an expert's output), I those of x (its input), P programs, M the
# rows of a tile.

from __future__ import annotations

import torch
from torch import Tensor

from ckptbridge.kernels.backend import jit, num_multiprocessors, tl
from ckptbridge.kernels.grouped_config import GroupedConfig
from ckptbridge.kernels.grouped_tiles import (
    descriptor,
    fits_descriptor,
    grouped_place,
    hopper_kernels,
    load_rows,
    multiply_add,
    parts_of,
    ragged_descriptor,
)


def launch_weight_gradient(
    d: Tensor,
    x: Tensor,
    ends_E: Tensor,
    d_rows_R: Tensor | None,
    x_rows_R: Tensor | None,
    out_EOI: Tensor,
    *,
    accumulate: bool,
    sums_squares: bool = False,
    config: GroupedConfig,
) -> Tensor | None:
    """Write out_EOI or add to it. Arguments and result as of `grouped_weight_gradient`."""
    if out_EOI.numel() == 0:
        return None
    E, outputs, inputs = out_EOI.shape
    tiles = E * -(-outputs // config.block_rows) * -(-inputs // config.block_columns)
    hopper = None if d_rows_R is not None or x_rows_R is not None else hopper_kernels(config, d, x, out_EOI)
    programs = min(tiles, (1 if hopper else config.programs) * num_multiprocessors(d.device))
    squares_PM = None
    if sums_squares:
        squares_PM = torch.empty(programs, config.block_rows, dtype=torch.float32, device=d.device)
    if hopper:
        hopper.launch_weight_gradient(d, x, ends_E, out_EOI, squares_PM, programs, accumulate=accumulate, config=config)
        return squares_PM
    arguments, knobs = weight_gradient_arguments(
        d, x, ends_E, d_rows_R, x_rows_R, out_EOI, squares_PM, accumulate=accumulate, config=config
    )
    _weight_gradient_kernel[(programs,)](*arguments, **knobs)
    return squares_PM


def weight_gradient_arguments(
    d: Tensor,
    x: Tensor,
    ends_E: Tensor,
    d_rows_R: Tensor | None,
    x_rows_R: Tensor | None,
    out_EOI: Tensor,
    squares_PM: Tensor | None,
    *,
    accumulate: bool,
    config: GroupedConfig,
) -> tuple[tuple, dict]:
    """What the kernel is called with: arguments by position, then by keyword."""
    E, outputs, inputs = out_EOI.shape
    BO, BI, BR = config.block_rows, config.block_columns, config.block_depth
    by_descriptor = config.descriptors and fits_descriptor(d) and fits_descriptor(x) and fits_descriptor(out_EOI)
    d_by_descriptor, x_by_descriptor = by_descriptor and d_rows_R is None, by_descriptor and x_rows_R is None
    stored_by_descriptor = by_descriptor and config.descriptor_stores
    arguments = (
        ragged_descriptor(d, [BR, BO]) if d_by_descriptor else d,
        ragged_descriptor(x, [BR, BI]) if x_by_descriptor else x,
        descriptor(out_EOI, [1, BO, BI // config.parts]) if stored_by_descriptor else out_EOI,
        ends_E,
        ends_E if d_rows_R is None else d_rows_R,
        ends_E if x_rows_R is None else x_rows_R,
        squares_PM,
    )
    knobs = {
        "E": E,
        "OUTPUTS": outputs,
        "INPUTS": inputs,
        "ACCUMULATE": accumulate,
        "D_GATHERED": d_rows_R is not None,
        "X_GATHERED": x_rows_R is not None,
        "DESCRIPTORS": by_descriptor,
        "DESCRIPTOR_STORES": stored_by_descriptor,
        "BLOCK_O": BO,
        "BLOCK_I": BI,
        "BLOCK_R": BR,
        "GROUP": config.group,
        "PARTS": config.parts,
        "FLATTEN": config.flatten,
        "INTERPRETED": d.device.type == "cpu",
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return arguments, knobs


@jit
def _load(
    source,
    rows_ptr,
    row,
    end,
    column,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    GATHERED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """[BLOCK_R, BLOCK_WIDTH] of the rows up to `end`, and zeros behind."""
    if DESCRIPTORS and not GATHERED:
        tile = load_rows(source, row, end, column)
    else:
        rows = row + tl.arange(0, BLOCK_R)
        present = rows < end
        if GATHERED:
            rows = tl.load(rows_ptr + rows, mask=present, other=-1)
            present = rows >= 0
        columns = column + tl.arange(0, BLOCK_WIDTH)
        pointers = source + rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        tile = tl.load(pointers, mask=present[:, None] & (columns < WIDTH)[None, :], other=0.0)
    return tile


@jit
def _finish(
    out,
    expert,
    row,
    column,
    tile,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BY_DESCRIPTOR: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Write or add a tile of an expert's gradient."""
    if BY_DESCRIPTOR:
        wide = tl.reshape(tile.to(out.dtype), [1, tile.shape[0], tile.shape[1]])
        if ACCUMULATE and INTERPRETED:
            out.store([expert, row, column], out.load([expert, row, column]) + wide)
        elif ACCUMULATE:
            out.atomic_add([expert, row, column], wide)
        else:
            out.store([expert, row, column], wide)
    else:
        rows = row + tl.arange(0, tile.shape[0])
        columns = column + tl.arange(0, tile.shape[1])
        mask = (rows < OUTPUTS)[:, None] & (columns < INPUTS)[None, :]
        pointers = out + (expert.to(tl.int64) * OUTPUTS + rows)[:, None] * INPUTS + columns[None, :]
        if ACCUMULATE:
            tile += tl.load(pointers, mask=mask, other=0.0)
        tl.store(pointers, tile.to(out.dtype.element_ty), mask=mask)


@jit
def _weight_gradient_kernel(
    d,  # descriptor or pointer, as are x and out
    x,
    out,
    ends_ptr,
    d_rows_ptr,
    x_rows_ptr,
    squares_ptr,
    E: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    D_GATHERED: tl.constexpr,
    X_GATHERED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    DESCRIPTOR_STORES: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    FLATTEN: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    ROW_TILES: tl.constexpr = (OUTPUTS + BLOCK_O - 1) // BLOCK_O
    COLUMN_TILES: tl.constexpr = (INPUTS + BLOCK_I - 1) // BLOCK_I
    PART: tl.constexpr = BLOCK_I // PARTS
    squares_O = tl.zeros((BLOCK_O,), dtype=tl.float32)
    for tile in tl.range(
        tl.program_id(0),
        E * ROW_TILES * COLUMN_TILES,
        tl.num_programs(0),
        flatten=FLATTEN,
    ):
        expert = tile // (ROW_TILES * COLUMN_TILES)
        row_tile, column_tile = grouped_place(tile % (ROW_TILES * COLUMN_TILES), ROW_TILES, COLUMN_TILES, GROUP)
        row, column = row_tile * BLOCK_O, column_tile * BLOCK_I
        begin = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
        end = tl.load(ends_ptr + expert)
        chunks = tl.maximum((end - begin + BLOCK_R - 1) // BLOCK_R, 1)
        sums = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
        for chunk in range(chunks):
            first = begin + chunk * BLOCK_R
            d_tile = _load(d, d_rows_ptr, first, end, row, OUTPUTS, BLOCK_R, BLOCK_O, D_GATHERED, DESCRIPTORS)
            x_tile = _load(x, x_rows_ptr, first, end, column, INPUTS, BLOCK_R, BLOCK_I, X_GATHERED, DESCRIPTORS)
            sums = multiply_add(d_tile.T, x_tile, sums, INTERPRETED)
        if squares_ptr is not None:
            squares_O += tl.sum(sums * sums, 1)
        parts = parts_of(sums, PARTS)
        for part in tl.static_range(PARTS):
            _finish(
                out,
                expert,
                row,
                column + part * PART,
                parts[part],
                OUTPUTS,
                INPUTS,
                ACCUMULATE,
                DESCRIPTOR_STORES,
                INTERPRETED,
            )
    if squares_ptr is not None:
        tl.store(squares_ptr + tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O), squares_O)
