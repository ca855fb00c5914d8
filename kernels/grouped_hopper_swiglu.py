"""An expert's first product with its SwiGLU, for Hopper: a Gluon kernel whose warps have roles.

A tile has columns of gate_proj and the same columns of up_proj, which the copy engine brings as one block of a weight
that is looked at as [E, 2, F, K]. So the program that has summed them writes them and the hidden units, and nobody has
to read them again: 2 of the 3 passes of R x F that swiglu takes by itself.
"""

# Shapes: R routed rows, E experts, F ffn width of an expert, K the depth of the sums. A tile is M rows by N columns,
# one half of them gate_proj's.
# ruff: noqa: RUF005 - a kernel cannot unpack with a star

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from ckptbridge.kernels.backend import num_multiprocessors
from ckptbridge.kernels.grouped_config import GroupedConfig
from ckptbridge.kernels.grouped_hopper import PART, buffers_beside_stages, descriptor_of, ragged_of
from ckptbridge.kernels.grouped_hopper_kernels import columns_of, give_lead, multiply, shared_memory, wait_for_lead
from ckptbridge.kernels.grouped_tiles import grouped_place, tile_table


def launch_swiglu(
    a: Tensor, weight: Tensor, ends_E: Tensor, h_RO: Tensor, out_RF: Tensor, *, config: GroupedConfig
) -> None:
    """Write h_RO, rows times their expert's weight^T, and out_RF, its SwiGLU.

    a: [R, K]; weight: [E, 2F, K], [gate_proj; up_proj]; h_RO: [R, 2F]. Rows from ends_E[-1] on are left as they are.
    """
    R, F = out_RF.shape
    table = tile_table(ends_E, R, config.block_rows)
    arguments, knobs = swiglu_arguments(a, weight, h_RO, out_RF, table, config=config)
    tiles = -(-R // config.block_rows) * -(-2 * F // config.block_columns)
    swiglu_kernel[(min(tiles, num_multiprocessors(a.device)),)](*arguments, **knobs)


def swiglu_arguments(
    a: Tensor, weight: Tensor, h_RO: Tensor, out_RF: Tensor, table: Tensor, *, config: GroupedConfig
) -> tuple[tuple, dict]:
    """What the kernel is called with: arguments by position, then by keyword."""
    R, F = out_RF.shape
    E, _, K = weight.shape
    half, width = config.block_rows // 2, PART // 2
    arguments = (
        descriptor_of(a, [half, config.block_depth]),
        descriptor_of(weight.view(E, 2, F, K), [1, 2, config.block_columns // 2, config.block_depth]),
        ragged_of(h_RO.view(R, 2, F), [half, 1, width]),
        ragged_of(out_RF, [half, width]),
        table,
    )
    knobs = {
        "F": F,
        "K": K,
        "M_": config.block_rows,
        "N_": config.block_columns,
        "K_": config.block_depth,
        "GROUP": config.group,
        "STAGES": config.num_stages,
        "BUFFERS": min(buffers_beside_stages(config), 3 * config.block_columns // 2 // width),
        "LEAD": config.lead,
        "num_warps": 4,
    }
    return arguments, knobs


@gluon.jit
def _loads(
    a,
    weight,
    tiles,
    barriers,
    table_ptr,
    F: gl.constexpr,
    K: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
):
    a_tiles, b_tiles, _ = tiles
    full, free, _ = barriers
    COLUMN_TILES: gl.constexpr = (F + BLOCK_N // 2 - 1) // (BLOCK_N // 2)
    num_row_tiles = gl.load(table_ptr)
    step = 0
    for tile in range(gl.program_id(0), num_row_tiles * COLUMN_TILES, gl.num_programs(0)):
        row_tile, column_tile = grouped_place(tile, num_row_tiles, COLUMN_TILES, GROUP)
        entry = table_ptr + (1 + row_tile) * 4
        expert = gl.load(entry)
        row = gl.load(entry + 1)
        column = column_tile * (BLOCK_N // 2)
        for k in range(0, K, BLOCK_K):
            stage = step % STAGES
            bar = full.index(stage)
            mbarrier.wait(free.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(bar, (BLOCK_M + BLOCK_N) * BLOCK_K * 2)
            tma.async_copy_global_to_shared(a, [row, k], bar, a_tiles.index(stage * 2))
            tma.async_copy_global_to_shared(weight, [expert, 0, column, k], bar, b_tiles.index(stage))
            tma.async_copy_global_to_shared(a, [row + BLOCK_M // 2, k], bar, a_tiles.index(stage * 2 + 1))
            step += 1


@gluon.jit
def _write(out, tiles, tile, coordinates, count: gl.constexpr, HALF: gl.constexpr, BUFFERS: gl.constexpr):
    """Write a part by the buffer whose turn it is."""
    buffer = tiles[2].index(HALF * BUFFERS + count % BUFFERS)
    tma.store_wait(BUFFERS - 1)
    buffer.reshape([tile.shape[0], tile.shape[1]]).store(tile)
    fence_async_shared()
    tma.async_copy_shared_to_global(out, coordinates, buffer.reshape(out.block_shape))


@gluon.jit
def _half(
    h,
    out,
    tiles,
    barriers,
    table_ptr,
    HALF: gl.constexpr,
    F: gl.constexpr,
    K: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
    LEAD: gl.constexpr,
):
    COLUMN_TILES: gl.constexpr = (F + BLOCK_N // 2 - 1) // (BLOCK_N // 2)
    STEPS: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    WIDTH: gl.constexpr = out.block_shape[3]
    PARTS: gl.constexpr = BLOCK_N // 2 // WIDTH
    num_row_tiles = gl.load(table_ptr)
    step = 0
    wait_for_lead(barriers, HALF, LEAD)
    for tile in range(gl.program_id(0), num_row_tiles * COLUMN_TILES, gl.num_programs(0)):
        row_tile, column_tile = grouped_place(tile, num_row_tiles, COLUMN_TILES, GROUP)
        entry = table_ptr + (1 + row_tile) * 4
        row = gl.load(entry + 1) + HALF * (BLOCK_M // 2)
        end = gl.load(entry + 2)
        sums = multiply(tiles, barriers, step, STEPS, HALF, False, True, BLOCK_M, BLOCK_N, STAGES, LEAD)
        step += STEPS
        parts = columns_of(sums, 2 * PARTS)
        place = (1073741824, end, 1073741824 - (end - row))
        for part in gl.static_range(PARTS):
            column = column_tile * (BLOCK_N // 2) + part * WIDTH
            gate_proj, up_proj = parts[part].to(h.dtype), parts[PARTS + part].to(h.dtype)
            _write(h, tiles, gate_proj, place + (gl.to_tensor(0), column), 3 * part, HALF, BUFFERS)
            _write(h, tiles, up_proj, place + (gl.to_tensor(1), column), 3 * part + 1, HALF, BUFFERS)
            # Of what was rounded: the backward pass sees no more.
            wide = gate_proj.to(gl.float32)
            hidden = wide / (1.0 + gl.exp(-wide)) * up_proj.to(gl.float32)
            _write(out, tiles, hidden.to(out.dtype), place + (column,), 3 * part + 2, HALF, BUFFERS)
    give_lead(barriers, step, HALF, LEAD)
    tma.store_wait(0)


@gluon.jit
def swiglu_kernel(
    a,  # descriptors: a by half tiles, h and out ragged
    weight,
    h,
    out,
    table_ptr,
    F: gl.constexpr,
    K: gl.constexpr,
    M_: gl.constexpr,
    N_: gl.constexpr,
    K_: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
    LEAD: gl.constexpr,
):
    """Rows times their expert's weight^T and what SwiGLU makes of it."""
    s, b = shared_memory(a, weight, out, STAGES, BUFFERS)
    t = table_ptr
    U: gl.constexpr = 0
    L: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_half, (h, out, s, b, t, U, F, K, M_, N_, K_, GROUP, STAGES, BUFFERS, LEAD)),
            (_half, (h, out, s, b, t, L, F, K, M_, N_, K_, GROUP, STAGES, BUFFERS, LEAD)),
            (_loads, (a, weight, s, b, t, F, K, M_, N_, K_, GROUP, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
