"""Rows sorted by expert, times their expert's matrix: the Triton kernel.

A persistent program a multiprocessor walks the list of tiles. The copy engine brings tiles of rows and weights into
shared memory (gathered rows come through cp.async, row by row), the tensor cores sum in fp32, and the copy engine
writes the result, clipped at the expert's last row. Rows read beyond that row meet no result.
"""

# Shapes: R routed rows, T tokens, E experts, K the depth of the sums, N output columns.

from __future__ import annotations

from torch import Tensor

from ckptbridge.kernels.backend import jit, num_multiprocessors, tl
from ckptbridge.kernels.grouped_config import GroupedConfig
from ckptbridge.kernels.grouped_tiles import (
    descriptor,
    fits_descriptor,
    grouped_place,
    hopper_kernels,
    most_row_tiles,
    multiply_add,
    parts_of,
    ragged_descriptor,
    store_rows,
    tile_table,
)


def launch_matmul(
    a: Tensor,
    weight: Tensor,
    ends_E: Tensor,
    rows_R: Tensor | None,
    out_RN: Tensor,
    *,
    transposed: bool,
    config: GroupedConfig,
) -> None:
    """Write out_RN; rows from ends_E[-1] on are left as they are. Arguments as of `grouped_matmul`."""
    R, N = out_RN.shape
    if out_RN.numel() == 0:
        return
    if rows_R is None and (hopper := hopper_kernels(config, a, weight, out_RN)):
        hopper.launch_matmul(a, weight, ends_E, out_RN, transposed=transposed, config=config)
        return
    table = tile_table(ends_E, R, config.block_rows)
    arguments, knobs = matmul_arguments(a, weight, rows_R, out_RN, table, transposed=transposed, config=config)
    tiles = most_row_tiles(R, len(ends_E), config.block_rows) * -(-N // config.block_columns)
    _matmul_kernel[(min(tiles, config.programs * num_multiprocessors(a.device)),)](*arguments, **knobs)


def matmul_arguments(
    a: Tensor,
    weight: Tensor,
    rows_R: Tensor | None,
    out_RN: Tensor,
    table: Tensor,
    *,
    transposed: bool,
    config: GroupedConfig,
) -> tuple[tuple, dict]:
    """What the kernel is called with: arguments by position, then by keyword."""
    N, K = out_RN.shape[1], a.shape[1]
    BM, BN, BK = config.block_rows, config.block_columns, config.block_depth
    by_descriptor = config.descriptors and fits_descriptor(weight) and fits_descriptor(out_RN) and fits_descriptor(a)
    a_by_descriptor = by_descriptor and rows_R is None
    stored_by_descriptor = by_descriptor and config.descriptor_stores
    arguments = (
        descriptor(a, [BM, BK]) if a_by_descriptor else a,
        descriptor(weight, [1, BN, BK] if transposed else [1, BK, BN]) if by_descriptor else weight,
        ragged_descriptor(out_RN, [BM, BN // config.parts]) if stored_by_descriptor else out_RN,
        table if rows_R is None else rows_R,
        table,
    )
    knobs = {
        "N": N,
        "K": K,
        "TRANSPOSED": transposed,
        "GATHERED": rows_R is not None,
        "DESCRIPTORS": by_descriptor,
        "DESCRIPTOR_STORES": stored_by_descriptor,
        "BLOCK_R": BM,
        "BLOCK_N": BN,
        "BLOCK_K": BK,
        "GROUP": config.group,
        "PARTS": config.parts,
        "FLATTEN": config.flatten,
        "INTERPRETED": a.device.type == "cpu",
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return arguments, knobs


@jit
def _load_a(a, row_pointers, present, row, k, K: tl.constexpr, BLOCK_K: tl.constexpr, BY_DESCRIPTOR: tl.constexpr):
    """[BLOCK_R, BLOCK_K] of the rows."""
    if BY_DESCRIPTOR:
        tile = a.load([row, k])
    else:
        depth = k + tl.arange(0, BLOCK_K)
        mask = present[:, None]
        if K % BLOCK_K != 0:
            mask = mask & (depth < K)[None, :]
        tile = tl.load(row_pointers + depth[None, :], mask=mask, other=0.0)
    return tile


@jit
def _load_weight(
    weight,
    expert,
    k,
    column,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """[BLOCK_K, BLOCK_N] of an expert's weight."""
    if DESCRIPTORS:
        if TRANSPOSED:
            tile = tl.reshape(weight.load([expert, column, k]), [BLOCK_N, BLOCK_K]).T
        else:
            tile = tl.reshape(weight.load([expert, k, column]), [BLOCK_K, BLOCK_N])
    else:
        depth = k + tl.arange(0, BLOCK_K)
        columns = column + tl.arange(0, BLOCK_N)
        matrix = weight + expert.to(tl.int64) * N * K
        mask = (depth < K)[:, None] & (columns < N)[None, :]
        if TRANSPOSED:
            tile = tl.load(matrix + columns[None, :] * K + depth[:, None], mask=mask, other=0.0)
        else:
            tile = tl.load(matrix + depth[:, None] * N + columns[None, :], mask=mask, other=0.0)
    return tile


@jit
def _store(out, row, end, column, tile, N: tl.constexpr, BY_DESCRIPTOR: tl.constexpr):
    """Write a tile up to row `end`."""
    if BY_DESCRIPTOR:
        store_rows(out, row, end, column, tile)
    else:
        rows = row + tl.arange(0, tile.shape[0])
        columns = column + tl.arange(0, tile.shape[1])
        mask = (rows < end)[:, None] & (columns < N)[None, :]
        tl.store(out + rows.to(tl.int64)[:, None] * N + columns[None, :], tile, mask=mask)


@jit
def _matmul_kernel(
    a,  # descriptor or pointer, as are weight and out
    weight,
    out,
    rows_ptr,
    table_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    GATHERED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    DESCRIPTOR_STORES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    FLATTEN: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    A_BY_DESCRIPTOR: tl.constexpr = DESCRIPTORS and not GATHERED
    COLUMN_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    PART: tl.constexpr = BLOCK_N // PARTS
    dtype: tl.constexpr = out.dtype if DESCRIPTOR_STORES else out.dtype.element_ty
    num_row_tiles = tl.load(table_ptr)
    for tile in tl.range(
        tl.program_id(0),
        num_row_tiles * COLUMN_TILES,
        tl.num_programs(0),
        flatten=FLATTEN,
    ):
        row_tile, column_tile = grouped_place(tile, num_row_tiles, COLUMN_TILES, GROUP)
        entry = table_ptr + (1 + row_tile) * 4
        expert = tl.load(entry)
        row = tl.load(entry + 1)
        end = tl.load(entry + 2)
        column = column_tile * BLOCK_N
        if A_BY_DESCRIPTOR:
            row_pointers, present = row, row  # unused
        else:
            rows = row + tl.arange(0, BLOCK_R)
            present = rows < end
            if GATHERED:
                rows = tl.load(rows_ptr + rows, mask=present, other=-1)
                present = rows >= 0
            row_pointers = a + rows.to(tl.int64)[:, None] * K
        sums = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            a_tile = _load_a(a, row_pointers, present, row, k, K, BLOCK_K, A_BY_DESCRIPTOR)
            weight_tile = _load_weight(weight, expert, k, column, N, K, BLOCK_N, BLOCK_K, TRANSPOSED, DESCRIPTORS)
            sums = multiply_add(a_tile, weight_tile, sums, INTERPRETED)
        parts = parts_of(sums.to(dtype), PARTS)
        for part in tl.static_range(PARTS):
            _store(out, row, end, column + part * PART, parts[part], N, DESCRIPTOR_STORES)
