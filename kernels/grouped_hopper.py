"""Grouped products whose warps have roles, for Hopper: launching the kernels of grouped_hopper_kernels.

They take what the copy engine can take, and gather nothing: `fits` says whether they can compute a product.
"""

# Shapes: R routed rows, E experts, N output columns, P programs, M the rows of a tile.

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ckptbridge.kernels.backend import num_multiprocessors
from ckptbridge.kernels.grouped_config import GroupedConfig
from ckptbridge.kernels.grouped_hopper_kernels import matmul_kernel, weight_gradient_kernel
from ckptbridge.kernels.grouped_tiles import fits_descriptor, most_row_tiles, ragged_descriptor, tile_table

SHARED = 226 * 1024  # bytes for tiles: a program has 1 KiB more, for barriers and the roles' bookkeeping
PART = 128  # bytes of a row that are stored at a time: what the copy engine swizzles


def fits(config: GroupedConfig, *tensors: Tensor) -> bool:
    """Whether the kernels can compute a product of `tensors`, the last of which is written."""
    if torch.cuda.get_device_capability(tensors[0].device)[0] != 9:
        return False
    return all(fits_descriptor(tensor) for tensor in tensors) and buffers_beside_stages(config) > 0


def launch_matmul(
    a: Tensor, weight: Tensor, ends_E: Tensor, out_RN: Tensor, *, transposed: bool, config: GroupedConfig
) -> None:
    """Write out_RN; rows from ends_E[-1] on are left as they are. Arguments as of `grouped_matmul`."""
    R, N = out_RN.shape
    table = tile_table(ends_E, R, config.block_rows)
    arguments, knobs = matmul_arguments(a, weight, out_RN, table, transposed=transposed, config=config)
    tiles = most_row_tiles(R, len(ends_E), config.block_rows) * -(-N // config.block_columns)
    matmul_kernel[(min(tiles, num_multiprocessors(a.device)),)](*arguments, **knobs)


def matmul_arguments(
    a: Tensor, weight: Tensor, out_RN: Tensor, table: Tensor, *, transposed: bool, config: GroupedConfig
) -> tuple[tuple, dict]:
    """What the kernel is called with: arguments by position, then by keyword."""
    half, BN, BK = config.block_rows // 2, config.block_columns, config.block_depth
    arguments = (
        descriptor_of(a, [half, BK]),
        descriptor_of(weight, [1, BN, BK] if transposed else [1, BK, BN]),
        ragged_of(out_RN, [half, PART // out_RN.element_size()]),
        table,
    )
    knobs = {"N": out_RN.shape[1], "K": a.shape[1], "TRANSPOSED": transposed}
    return arguments, knobs | _knobs(config, out_RN)


def launch_weight_gradient(
    d: Tensor,
    x: Tensor,
    ends_E: Tensor,
    out_EOI: Tensor,
    squares_PM: Tensor | None,
    programs: int,
    *,
    accumulate: bool,
    config: GroupedConfig,
) -> None:
    """Write out_EOI or add to it, and the squares where they are wanted, by so many programs."""
    arguments, knobs = weight_gradient_arguments(
        d, x, ends_E, out_EOI, squares_PM, accumulate=accumulate, config=config
    )
    weight_gradient_kernel[(programs,)](*arguments, **knobs)


def weight_gradient_arguments(
    d: Tensor,
    x: Tensor,
    ends_E: Tensor,
    out_EOI: Tensor,
    squares_PM: Tensor | None,
    *,
    accumulate: bool,
    config: GroupedConfig,
) -> tuple[tuple, dict]:
    """What the kernel is called with: arguments by position, then by keyword."""
    E, outputs, inputs = out_EOI.shape
    half, BI, BR = config.block_rows // 2, config.block_columns, config.block_depth
    arguments = (
        ragged_of(d, [BR, half]),
        ragged_of(x, [BR, BI]),
        descriptor_of(out_EOI, [1, half, PART // out_EOI.element_size()]),
        ends_E,
        ends_E if squares_PM is None else squares_PM,  # warps with roles can be told no None
    )
    knobs = {"E": E, "OUTPUTS": outputs, "INPUTS": inputs, "ADD": accumulate, "SQUARES": squares_PM is not None}
    return arguments, knobs | _knobs(config, out_EOI)


def _knobs(config: GroupedConfig, out: Tensor) -> dict:
    return {
        "M_": config.block_rows,
        "N_": config.block_columns,
        "K_": config.block_depth,
        "GROUP": config.group,
        "STAGES": config.num_stages,
        "BUFFERS": min(buffers_beside_stages(config), config.block_columns * out.element_size() // PART),
        "LEAD": config.lead,
        "num_warps": 4,  # of the first half; the compiler adds those of the others
    }


def buffers_beside_stages(config: GroupedConfig) -> int:
    """How many parts of half a tile there is room for beside the stages, for each half."""
    stages = config.num_stages * (config.block_rows + config.block_columns) * config.block_depth * 2
    return (SHARED - stages) // (config.block_rows * PART)


def descriptor_of(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """A copy-engine descriptor of a contiguous tensor, by tiles of `block`."""
    return _with_layout(tensor, list(tensor.shape), list(tensor.stride()), block)


def ragged_of(rows: Tensor, block: list[int]) -> TensorDescriptor:
    """One of contiguous rows, of any dimensions each, that clips at a row: as `ragged_descriptor` does."""
    ragged = ragged_descriptor(rows.flatten(1), [1, 1])
    shape, strides = ragged.shape[:3], ragged.strides[:3]
    return _with_layout(rows, [*shape, *rows.shape[1:]], [*strides, *rows.stride()[1:]], [1, 1, *block])


def _with_layout(tensor: Tensor, shape: list[int], strides: list[int], block: list[int]) -> TensorDescriptor:
    layout = NVMMASharedLayout(PART, tensor.element_size() * 8, rank=len(block))
    return TensorDescriptor(tensor, shape, strides, block, layout)
