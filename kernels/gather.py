"""Rows of tokens to the places of their choices among the sorted rows, and back: summed, token by token.

The sums are in fp32, in the order of a token's choices, and rounded once. Every result is written by one program, so
the bits do not depend on which thread comes first.

Memory-bound. Floor, in passes of H over HBM: gather_rows forward T + R and backward R + T (each token is read once and
written K times, whatever the order of the rows); sum_rows forward R + T, backward T + R, and R + T more for the
gradient of the weights. The experts need no more than the first two: see `experts.py`.
"""

# Shapes: T tokens, K top-k, R routed rows (a buffer's rows; some may be padding, some unused), H hidden_size.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ckptbridge.kernels.arguments import check_shape, check_tensor
from ckptbridge.kernels.backend import Backend, compiled, jit, require_backend, tl
from ckptbridge.kernels.order import Order

_ROWS_LOOKED_AT = 64
"""Rows of which one program looks for padding: they are read as 4 bytes each and, when there is none, left alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsConfig:
    """Launch knobs. A program works on `block_tokens` tokens x `block_width` columns, and all K rows of each token."""

    block_tokens: int
    block_width: int
    num_warps: int = 4

    @classmethod
    def from_shape(cls, hidden_size: int) -> RowsConfig:
        """Knobs for rows of `hidden_size` elements."""
        # 16 elements a thread of 4 warps: two 16-byte loads of bf16 under way for each of the K rows.
        tile = 2048
        # The widest power of two that divides H leaves no lane idle (H = 3584: 512, 6144: 2048). Below 64 elements a
        # row's piece is shorter than a 128-byte line; then rather idle lanes at the row's end.
        block_width = min(hidden_size & -hidden_size, tile)
        if block_width < 64:
            block_width = min(1 << (hidden_size - 1).bit_length(), 1024)
        return cls(block_tokens=tile // block_width, block_width=block_width)


def gather_rows_reference(x_TH: Tensor, tokens_R: Tensor) -> Tensor:
    """The definition: a copy of each row's token, zeros where there is none; autograd differentiates it."""
    places = tokens_R.clamp(0, x_TH.shape[0] - 1)
    return x_TH[places].masked_fill((tokens_R < 0).unsqueeze(-1), 0)


def sum_rows_reference(y_RH: Tensor, rows_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """The definition: each token's rows, weighted and summed; autograd differentiates it. Also takes fp64."""
    y_TKH = y_RH[rows_TK.clamp(min=0)].masked_fill((rows_TK < 0).unsqueeze(-1), 0)
    y_TKH = y_TKH.to(torch.promote_types(y_RH.dtype, torch.float32))
    return (y_TKH if weights_TK is None else y_TKH * weights_TK.unsqueeze(-1)).sum(1).to(y_RH.dtype)


def gather_rows(
    x_TH: Tensor, order: Order, *, backend: Backend = "reference", config: RowsConfig | None = None
) -> Tensor:
    """Copy each token to the places of its choices among the rows sorted by expert: [R, H].

    x_TH: [T, H], contiguous, fp32 or bf16. Rows of padding are zeros; rows from ends_E[-1] on hold anything. The
    gradient is the sum of each token's rows. `config` overrides the launch knobs of the triton backend. Raises
    ValueError for arguments that do not fit and BackendError when `backend` cannot run on the device of x_TH.
    """
    check_tensor("gather_rows", "x_TH", x_TH)
    _check_order("gather_rows", order, x_TH)
    check_shape("gather_rows", "x_TH", x_TH, (order.rows_TK.shape[0], x_TH.shape[-1]), "a row for each token")
    require_backend(backend, x_TH.device)
    return _GatherRows.apply(x_TH, order, backend, config or RowsConfig.from_shape(x_TH.shape[1]))


def sum_rows(
    y_RH: Tensor,
    order: Order,
    weights_TK: Tensor | None = None,
    *,
    backend: Backend = "reference",
    config: RowsConfig | None = None,
) -> Tensor:
    """Sum the rows of each token's choices, each times its weight: [T, H].

    y_RH: [R, H], contiguous, fp32 or bf16, in the order of `gather_rows`. weights_TK: [T, K] fp32, or None for ones.
    Dropped choices add nothing. Both carry gradients. `config` overrides the launch knobs of the triton backend. Raises
    ValueError for arguments that do not fit and BackendError when `backend` cannot run on the device of y_RH.
    """
    check_tensor("sum_rows", "y_RH", y_RH)
    _check_order("sum_rows", order, y_RH)
    check_shape("sum_rows", "y_RH", y_RH, (order.tokens_R.shape[0], y_RH.shape[-1]), "a row for each of the order's")
    if weights_TK is not None:
        check_weights("sum_rows", weights_TK, order)
    require_backend(backend, y_RH.device)
    return _SumRows.apply(y_RH, order, weights_TK, backend, config or RowsConfig.from_shape(y_RH.shape[1]))


def check_weights(operation: str, weights_TK: Tensor, order: Order) -> None:
    """Refuse weights that are not one fp32 number for each choice."""
    check_tensor(operation, "weights_TK", weights_TK, like=order.rows_TK)
    check_shape(operation, "weights_TK", weights_TK, tuple(order.rows_TK.shape), "one for each choice")
    if weights_TK.dtype != torch.float32:
        raise ValueError(f"{operation}: weights_TK: expected dtype torch.float32, found {weights_TK.dtype}")


def _check_order(operation: str, order: Order, rows: Tensor) -> None:
    if rows.ndim != 2 or rows.shape[1] < 1:
        raise ValueError(f"{operation}: expected a matrix of one column at least, found shape {tuple(rows.shape)}")
    for name, tensor in (("tokens_R", order.tokens_R), ("rows_TK", order.rows_TK)):
        if tensor.dtype != torch.int32 or not tensor.is_contiguous() or tensor.device != rows.device:
            raise ValueError(
                f"{operation}: order.{name}: expected contiguous torch.int32 on {rows.device}, found {tensor.dtype} "
                f"on {tensor.device} with strides {tensor.stride()}"
            )


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, order, backend, config):
        ctx.order, ctx.backend, ctx.config = order, backend, config
        return _gathered(x_TH, order, None, backend, config)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_RH):
        return _summed(d_RH.contiguous(), ctx.order, None, ctx.backend, ctx.config), None, None, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_RH, order, weights_TK, backend, config):
        ctx.order, ctx.backend, ctx.config = order, backend, config
        needs_rows = weights_TK is not None and weights_TK.requires_grad
        ctx.save_for_backward(y_RH if needs_rows else None, weights_TK)
        return _summed(y_RH, order, weights_TK, backend, config)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_TH):
        y_RH, weights_TK = ctx.saved_tensors
        d_TH = d_TH.contiguous()
        d_y = d_weights = None
        if ctx.needs_input_grad[0]:
            d_y = _gathered(d_TH, ctx.order, weights_TK, ctx.backend, ctx.config)
        if ctx.needs_input_grad[2]:
            d_weights = _products(y_RH, d_TH, ctx.order, ctx.backend, ctx.config)
        return d_y, None, d_weights, None, None


def _gathered(x_TH: Tensor, order: Order, weights_TK: Tensor | None, backend: Backend, config: RowsConfig) -> Tensor:
    """Each token's row at the places of its choices, times their weights."""
    if backend != "triton":
        definition = gather_rows_reference if weights_TK is None else _weighted_gather
        arguments = (x_TH, order.tokens_R) if weights_TK is None else (x_TH, order.tokens_R, order.rows_TK, weights_TK)
        return (compiled(definition) if backend == "torch" else definition)(*arguments)
    (T, H), K, R = x_TH.shape, order.rows_TK.shape[1], order.tokens_R.shape[0]
    out_RH = x_TH.new_empty(R, H)
    programs_for_padding = -(-R // _ROWS_LOOKED_AT)
    programs = programs_for_padding + -(-T // config.block_tokens) * -(-H // config.block_width)
    if R > 0:
        _gather_kernel[(programs,)](
            x_TH,
            weights_TK,
            order.rows_TK,
            order.tokens_R,
            out_RH,
            T,
            R,
            programs_for_padding,
            H=H,
            K=K,
            BLOCK_T=config.block_tokens,
            BLOCK_H=config.block_width,
            BLOCK_R=_ROWS_LOOKED_AT,
            num_warps=config.num_warps,
        )
    return out_RH


def _summed(y_RH: Tensor, order: Order, weights_TK: Tensor | None, backend: Backend, config: RowsConfig) -> Tensor:
    """Each token's rows, weighted and summed."""
    if backend != "triton":
        definition = compiled(sum_rows_reference) if backend == "torch" else sum_rows_reference
        return definition(y_RH, order.rows_TK, weights_TK)
    H, (T, K) = y_RH.shape[1], order.rows_TK.shape
    out_TH = y_RH.new_empty(T, H)
    programs = -(-T // config.block_tokens) * -(-H // config.block_width)
    if programs > 0:
        _sum_kernel[(programs,)](
            y_RH,
            weights_TK,
            order.rows_TK,
            out_TH,
            T,
            H=H,
            K=K,
            BLOCK_T=config.block_tokens,
            BLOCK_H=config.block_width,
            num_warps=config.num_warps,
        )
    return out_TH


def _products(y_RH: Tensor, d_TH: Tensor, order: Order, backend: Backend, config: RowsConfig) -> Tensor:
    """For each choice the product of its row with the token's gradient, zero where it was dropped: [T, K] fp32."""
    if backend != "triton":
        definition = compiled(_products_reference) if backend == "torch" else _products_reference
        return definition(y_RH, d_TH, order.rows_TK)
    H, (T, K) = y_RH.shape[1], order.rows_TK.shape
    out_TK = y_RH.new_empty(T, K, dtype=torch.float32)
    if T * K > 0:
        _products_kernel[(-(-T * K // config.block_tokens),)](
            y_RH,
            d_TH,
            order.rows_TK,
            out_TK,
            T * K,
            H=H,
            K=K,
            BLOCK_C=config.block_tokens,
            BLOCK_H=config.block_width,
            num_warps=config.num_warps,
        )
    return out_TK


def _weighted_gather(x_TH: Tensor, tokens_R: Tensor, rows_TK: Tensor, weights_TK: Tensor) -> Tensor:
    return (gather_rows_reference(x_TH, tokens_R) * weights_by_row(rows_TK, weights_TK, tokens_R.shape[0])).to(
        x_TH.dtype
    )


def weights_by_row(rows_TK: Tensor, weights_TK: Tensor, rows: int) -> Tensor:
    """The weight of each sorted row, zero where no choice stands: [R, 1]."""
    # What was dropped goes to a row behind the last, and is cut off.
    places = torch.where(rows_TK < 0, rows, rows_TK).flatten().long()
    return weights_TK.new_zeros(rows + 1).index_copy_(0, places, weights_TK.flatten())[:rows].unsqueeze(-1)


def _products_reference(y_RH: Tensor, d_TH: Tensor, rows_TK: Tensor) -> Tensor:
    y_TKH = y_RH[rows_TK.clamp(min=0)].float()
    return (y_TKH * d_TH.unsqueeze(1)).sum(-1).masked_fill(rows_TK < 0, 0)


@jit
def _gather_kernel(
    x_ptr,
    weights_ptr,
    rows_ptr,
    tokens_ptr,
    out_ptr,
    T,
    R,
    programs_for_padding,
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    program = tl.program_id(0)
    if program < programs_for_padding:
        rows = program * BLOCK_R + tl.arange(0, BLOCK_R)
        is_padding = tl.load(tokens_ptr + rows, mask=rows < R, other=0) < 0
        if tl.max(is_padding.to(tl.int32), 0) > 0:
            for start in range(0, H, 64):
                columns = start + tl.arange(0, 64)
                mask = is_padding[:, None] & (columns < H)[None, :]
                zeros = tl.zeros([BLOCK_R, 64], dtype=out_ptr.dtype.element_ty)
                tl.store(out_ptr + rows.to(tl.int64)[:, None] * H + columns[None, :], zeros, mask=mask)
    else:
        tile = program - programs_for_padding
        tiles_in_a_row: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H  # neighbouring programs read neighbouring columns
        tokens = (tile // tiles_in_a_row) * BLOCK_T + tl.arange(0, BLOCK_T)
        columns = (tile % tiles_in_a_row) * BLOCK_H + tl.arange(0, BLOCK_H)
        mask = (tokens < T)[:, None] & (columns < H)[None, :]
        # int64: T x H, and R x H all the more, passes 2**31 in real runs.
        x = tl.load(x_ptr + tokens.to(tl.int64)[:, None] * H + columns[None, :], mask=mask, other=0.0)
        for k in tl.static_range(K):
            row = tl.load(rows_ptr + tokens * K + k, mask=tokens < T, other=-1)
            scaled = x
            if weights_ptr is not None:
                weight = tl.load(weights_ptr + tokens * K + k, mask=row >= 0, other=0.0)
                scaled = (x.to(tl.float32) * weight[:, None]).to(x.dtype)
            place = out_ptr + row.to(tl.int64)[:, None] * H + columns[None, :]
            tl.store(place, scaled, mask=mask & (row >= 0)[:, None])


@jit
def _sum_kernel(
    y_ptr,
    weights_ptr,
    rows_ptr,
    out_ptr,
    T,
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    program = tl.program_id(0)
    tiles_in_a_row: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    tokens = (program // tiles_in_a_row) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = (program % tiles_in_a_row) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros([BLOCK_T, BLOCK_H], dtype=tl.float32)
    for k in tl.static_range(K):
        row = tl.load(rows_ptr + tokens * K + k, mask=tokens < T, other=-1)
        mask = (row >= 0)[:, None] & (columns < H)[None, :]
        y = tl.load(y_ptr + row.to(tl.int64)[:, None] * H + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        if weights_ptr is not None:
            y *= tl.load(weights_ptr + tokens * K + k, mask=row >= 0, other=0.0)[:, None]
        total += y
    mask = (tokens < T)[:, None] & (columns < H)[None, :]
    out = out_ptr + tokens.to(tl.int64)[:, None] * H + columns[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _products_kernel(
    y_ptr,
    d_ptr,
    rows_ptr,
    out_ptr,
    choices_count,
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    choices = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.load(rows_ptr + choices, mask=choices < choices_count, other=-1)
    token = choices // K
    total = tl.zeros([BLOCK_C, BLOCK_H], dtype=tl.float32)
    for start in range(0, H, BLOCK_H):
        columns = start + tl.arange(0, BLOCK_H)
        mask = (row >= 0)[:, None] & (columns < H)[None, :]
        y = tl.load(y_ptr + row.to(tl.int64)[:, None] * H + columns[None, :], mask=mask, other=0.0)
        d = tl.load(d_ptr + token.to(tl.int64)[:, None] * H + columns[None, :], mask=mask, other=0.0)
        total += y.to(tl.float32) * d.to(tl.float32)
    tl.store(out_ptr + choices, tl.sum(total, 1), mask=choices < choices_count)
