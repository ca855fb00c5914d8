"""Grouped products whose warps have roles, for Hopper: the Gluon kernels.

One warp asks the copy engine for tiles, as far ahead as shared memory has stages. Two groups of four warps multiply,
each the upper or the lower half of a tile's rows: while one of them stores its half, the other feeds the tensor cores.
Barriers in shared memory say which stages are full and which are free again.

A half tile leaves in parts of 128 bytes a row, through buffers that take turns, by the copy engine.
"""

# Shapes: E experts, K the depth of the sums, N output columns; O the columns of d, I those of x. A tile is M x N, and
# sums over BLOCK_K at a time.

# ruff: noqa: RUF005 - a kernel cannot unpack with a star

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ckptbridge.kernels.grouped_tiles import grouped_place

# Triton 3.9 has the newer names alone, 3.6 the older ones.
_load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gl._core.builtin
def _add_shared_to_global(descriptor, coordinates, source, _semantic=None):
    """The copy engine's addition. Gluon 3.6 can build it and has no name for it."""
    kind = gl._core.ir.DESCRIPTOR_REDUCE_KIND.ADD
    coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    _semantic.builder.create_async_tma_reduce(kind, descriptor.handle, coordinates, source.handle)


@gluon.jit
def shared_memory(a, b, out, STAGES: gl.constexpr, BUFFERS: gl.constexpr):
    """Room for stages, for what is stored, and barriers: a stage is full, is free; the second half may begin."""
    a_tiles = gl.allocate_shared_memory(a.dtype, [STAGES * 2] + a.block_shape, a.layout)
    b_tiles = gl.allocate_shared_memory(b.dtype, [STAGES] + b.block_shape, b.layout)
    out_tiles = gl.allocate_shared_memory(out.dtype, [BUFFERS * 2] + out.block_shape, out.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    begun = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(begun, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    fence_async_shared()
    return (a_tiles, b_tiles, out_tiles), (full, free, begun)


@gluon.jit
def _matrix(stage, TRANSPOSED: gl.constexpr):
    """A stage as a matrix of its last dimension, transposed if asked for."""
    matrix = stage.reshape([stage.numel // stage.shape[-1], stage.shape[-1]])
    if TRANSPOSED:
        matrix = matrix.permute([1, 0])
    return matrix


@gluon.jit
def multiply(
    tiles,
    barriers,
    step,
    steps,
    HALF: gl.constexpr,
    A_TRANSPOSED: gl.constexpr,
    B_TRANSPOSED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    LEAD: gl.constexpr,
):
    """The sum over `steps` stages from `step` on, of one half of the rows."""
    a_tiles, b_tiles, _ = tiles
    full, free, begun = barriers
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    sums = gl.zeros([BLOCK_M // 2, BLOCK_N], gl.float32, layout)
    for i in range(steps):
        stage = (step + i) % STAGES
        mbarrier.wait(full.index(stage), ((step + i) // STAGES) & 1)
        a = _matrix(a_tiles.index(stage * 2 + HALF), A_TRANSPOSED)
        b = _matrix(b_tiles.index(stage), B_TRANSPOSED)
        sums = warpgroup_mma(a, b, sums, use_acc=i > 0, is_async=True)
        sums = warpgroup_mma_wait(1, deps=[sums])
        # One product is under way; the one before is done, and with its stage.
        mbarrier.arrive(free.index((step + i + STAGES - 1) % STAGES), pred=i > 0)
        if LEAD > 0 and HALF == 0:
            mbarrier.arrive(begun, pred=step + i == LEAD)
    sums = warpgroup_mma_wait(0, deps=[sums])
    mbarrier.arrive(free.index((step + steps + STAGES - 1) % STAGES))
    return sums


@gluon.jit
def wait_for_lead(barriers, HALF: gl.constexpr, LEAD: gl.constexpr):
    """Let the first half run ahead, so that the two halves store at different times."""
    if LEAD > 0 and HALF == 1:
        mbarrier.wait(barriers[2], 0)


@gluon.jit
def give_lead(barriers, steps, HALF: gl.constexpr, LEAD: gl.constexpr):
    """Release the second half if all the first half's steps were too few to do so."""
    if LEAD > 0 and HALF == 0:
        mbarrier.arrive(barriers[2], pred=steps <= LEAD)


@gluon.jit
def columns_of(tile, PARTS: gl.constexpr):
    """A tile cut into blocks of columns, from left to right."""
    if PARTS == 1:
        parts = (tile,)
    else:
        pairs = gl.permute(gl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2]), [0, 2, 1])
        left, right = gl.split(pairs)
        parts = columns_of(left, PARTS // 2) + columns_of(right, PARTS // 2)
    return parts


@gluon.jit
def _store(out, tiles, sums, place, column, HALF: gl.constexpr, BUFFERS: gl.constexpr, ACCUMULATE: gl.constexpr):
    """Write or add a half tile at `place` (all coordinates but the column)."""
    ROWS: gl.constexpr = sums.shape[0]
    WIDTH: gl.constexpr = out.block_shape[-1]
    PARTS: gl.constexpr = sums.shape[1] // WIDTH
    parts = columns_of(sums.to(out.dtype), PARTS)
    for part in gl.static_range(PARTS):
        buffer = tiles[2].index(HALF * BUFFERS + part % BUFFERS)
        tma.store_wait(BUFFERS - 1)
        buffer.reshape([ROWS, WIDTH]).store(parts[part])
        fence_async_shared()
        if ACCUMULATE:
            _add_shared_to_global(out, place + (column + part * WIDTH,), buffer)
        else:
            _store_tile(out, place + (column + part * WIDTH,), buffer)


@gluon.jit
def _matmul_loads(
    a,
    weight,
    tiles,
    barriers,
    table_ptr,
    N: gl.constexpr,
    K: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
):
    a_tiles, b_tiles, _ = tiles
    full, free, _ = barriers
    COLUMN_TILES: gl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    num_row_tiles = gl.load(table_ptr)
    step = 0
    for tile in range(gl.program_id(0), num_row_tiles * COLUMN_TILES, gl.num_programs(0)):
        row_tile, column_tile = grouped_place(tile, num_row_tiles, COLUMN_TILES, GROUP)
        entry = table_ptr + (1 + row_tile) * 4
        expert = gl.load(entry)
        row = gl.load(entry + 1)
        column = column_tile * BLOCK_N
        for k in range(0, K, BLOCK_K):
            stage = step % STAGES
            bar = full.index(stage)
            mbarrier.wait(free.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(bar, (BLOCK_M + BLOCK_N) * BLOCK_K * 2)
            _load_tile(a, [row, k], bar, a_tiles.index(stage * 2))
            if TRANSPOSED:
                _load_tile(weight, [expert, column, k], bar, b_tiles.index(stage))
            else:
                _load_tile(weight, [expert, k, column], bar, b_tiles.index(stage))
            _load_tile(a, [row + BLOCK_M // 2, k], bar, a_tiles.index(stage * 2 + 1))
            step += 1


@gluon.jit
def _matmul_half(
    out,
    tiles,
    barriers,
    table_ptr,
    HALF: gl.constexpr,
    N: gl.constexpr,
    K: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
    LEAD: gl.constexpr,
):
    COLUMN_TILES: gl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    STEPS: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    num_row_tiles = gl.load(table_ptr)
    step = 0
    wait_for_lead(barriers, HALF, LEAD)
    for tile in range(gl.program_id(0), num_row_tiles * COLUMN_TILES, gl.num_programs(0)):
        row_tile, column_tile = grouped_place(tile, num_row_tiles, COLUMN_TILES, GROUP)
        entry = table_ptr + (1 + row_tile) * 4
        row = gl.load(entry + 1) + HALF * (BLOCK_M // 2)
        end = gl.load(entry + 2)
        sums = multiply(tiles, barriers, step, STEPS, HALF, False, TRANSPOSED, BLOCK_M, BLOCK_N, STAGES, LEAD)
        step += STEPS
        # Rows behind the expert's last are asked for behind the descriptor's own, and not written.
        place = (1073741824, end, 1073741824 - (end - row))
        _store(out, tiles, sums, place, column_tile * BLOCK_N, HALF, BUFFERS, False)
    give_lead(barriers, step, HALF, LEAD)
    tma.store_wait(0)


@gluon.jit
def matmul_kernel(
    a,  # descriptors: a by half tiles, out ragged
    weight,
    out,
    table_ptr,
    N: gl.constexpr,
    K: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    M_: gl.constexpr,
    N_: gl.constexpr,
    K_: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
    LEAD: gl.constexpr,
):
    """Rows times their expert's matrix, N_ columns of M_ rows at a time."""
    s, b = shared_memory(a, weight, out, STAGES, BUFFERS)
    t = table_ptr
    U: gl.constexpr = 0
    L: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_matmul_half, (out, s, b, t, U, N, K, TRANSPOSED, M_, N_, K_, GROUP, STAGES, BUFFERS, LEAD)),
            (_matmul_half, (out, s, b, t, L, N, K, TRANSPOSED, M_, N_, K_, GROUP, STAGES, BUFFERS, LEAD)),
            (_matmul_loads, (a, weight, s, b, t, N, K, TRANSPOSED, M_, N_, K_, GROUP, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _rows_of(ends_ptr, tile, PER_EXPERT: gl.constexpr, TILES: gl.constexpr):
    """Where the rows of a tile's expert begin and end; those of the last expert for a tile behind the last."""
    expert = gl.minimum(tile, TILES - 1) // PER_EXPERT
    begin = gl.load(ends_ptr + gl.maximum(expert - 1, 0))
    return gl.where(expert > 0, begin, 0), gl.load(ends_ptr + expert)


@gluon.jit
def _gradient_loads(
    d,
    x,
    tiles,
    barriers,
    ends_ptr,
    E: gl.constexpr,
    OUTPUTS: gl.constexpr,
    INPUTS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
):
    a_tiles, b_tiles, _ = tiles
    full, free, _ = barriers
    ROW_TILES: gl.constexpr = (OUTPUTS + BLOCK_M - 1) // BLOCK_M
    COLUMN_TILES: gl.constexpr = (INPUTS + BLOCK_N - 1) // BLOCK_N
    PER_EXPERT: gl.constexpr = ROW_TILES * COLUMN_TILES
    step = 0
    for tile in range(gl.program_id(0), E * PER_EXPERT, gl.num_programs(0)):
        begin, end = _rows_of(ends_ptr, tile, PER_EXPERT, E * PER_EXPERT)
        row_tile, column_tile = grouped_place(tile % PER_EXPERT, ROW_TILES, COLUMN_TILES, GROUP)
        upper, column = row_tile * BLOCK_M, column_tile * BLOCK_N
        lower = upper + BLOCK_M // 2
        # An expert without rows still has a step, of zeros.
        for first in range(begin, gl.maximum(end, begin + 1), BLOCK_K):
            stage = step % STAGES
            bar = full.index(stage)
            row = 1073741824 - (end - first)
            mbarrier.wait(free.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(bar, (BLOCK_M + BLOCK_N) * BLOCK_K * 2)
            _load_tile(d, [1073741824, end, row, upper], bar, a_tiles.index(stage * 2))
            _load_tile(x, [1073741824, end, row, column], bar, b_tiles.index(stage))
            _load_tile(d, [1073741824, end, row, lower], bar, a_tiles.index(stage * 2 + 1))
            step += 1


@gluon.jit
def _gradient_half(
    out,
    tiles,
    barriers,
    ends_ptr,
    squares_ptr,
    HALF: gl.constexpr,
    E: gl.constexpr,
    OUTPUTS: gl.constexpr,
    INPUTS: gl.constexpr,
    ACCUMULATE: gl.constexpr,
    SQUARES: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
    LEAD: gl.constexpr,
):
    ROW_TILES: gl.constexpr = (OUTPUTS + BLOCK_M - 1) // BLOCK_M
    COLUMN_TILES: gl.constexpr = (INPUTS + BLOCK_N - 1) // BLOCK_N
    PER_EXPERT: gl.constexpr = ROW_TILES * COLUMN_TILES
    TILES: gl.constexpr = E * PER_EXPERT
    # Summed along a row alone, which the threads of a quad hold: no warp waits for another.
    layout: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16]))
    squares = gl.zeros([BLOCK_M // 2], gl.float32, layout)
    step = 0
    begin, end = _rows_of(ends_ptr, gl.program_id(0), PER_EXPERT, TILES)
    wait_for_lead(barriers, HALF, LEAD)
    for tile in range(gl.program_id(0), TILES, gl.num_programs(0)):
        # Asked for a tile ahead: the loop cannot start without.
        next_begin, next_end = _rows_of(ends_ptr, tile + gl.num_programs(0), PER_EXPERT, TILES)
        row_tile, column_tile = grouped_place(tile % PER_EXPERT, ROW_TILES, COLUMN_TILES, GROUP)
        steps = gl.maximum((end - begin + BLOCK_K - 1) // BLOCK_K, 1)
        sums = multiply(tiles, barriers, step, steps, HALF, True, False, BLOCK_M, BLOCK_N, STAGES, LEAD)
        step += steps
        if SQUARES:
            squares += gl.sum(sums * sums, 1)
        place = (tile // PER_EXPERT, row_tile * BLOCK_M + HALF * (BLOCK_M // 2))
        _store(out, tiles, sums, place, column_tile * BLOCK_N, HALF, BUFFERS, ACCUMULATE)
        begin, end = next_begin, next_end
    give_lead(barriers, step, HALF, LEAD)
    if SQUARES:
        first = gl.program_id(0) * BLOCK_M + HALF * (BLOCK_M // 2)
        gl.store(squares_ptr + first + gl.arange(0, BLOCK_M // 2, layout), squares)
    tma.store_wait(0)


@gluon.jit
def weight_gradient_kernel(
    d,  # descriptors: d by half tiles and ragged, x ragged
    x,
    out,
    ends_ptr,
    squares_ptr,
    E: gl.constexpr,
    OUTPUTS: gl.constexpr,
    INPUTS: gl.constexpr,
    ADD: gl.constexpr,
    SQUARES: gl.constexpr,
    M_: gl.constexpr,
    N_: gl.constexpr,
    K_: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
    LEAD: gl.constexpr,
):
    """Each expert's sum over its rows of d^T x, N_ columns of M_ rows at a time.

    With SQUARES each program leaves the sums of squares of what it wrote, by the row of a tile.
    """
    s, b = shared_memory(d, x, out, STAGES, BUFFERS)
    t = ends_ptr
    q = squares_ptr
    U: gl.constexpr = 0
    L: gl.constexpr = 1
    gl.warp_specialize(
        [
            (
                _gradient_half,
                (out, s, b, t, q, U, E, OUTPUTS, INPUTS, ADD, SQUARES, M_, N_, K_, GROUP, STAGES, BUFFERS, LEAD),
            ),
            (
                _gradient_half,
                (out, s, b, t, q, L, E, OUTPUTS, INPUTS, ADD, SQUARES, M_, N_, K_, GROUP, STAGES, BUFFERS, LEAD),
            ),
            (_gradient_loads, (d, x, s, b, t, E, OUTPUTS, INPUTS, M_, N_, K_, GROUP, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
