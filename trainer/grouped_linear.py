"""One matrix an expert, applied to rows that are sorted by expert.

On a GPU in bf16 it is one launch of torch's grouped product, and the row counts stay on the device. Elsewhere it is
a product an expert.

Shapes: R routed rows, E experts, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_ALIGNED_COLUMNS = 8
"""The grouped product wants rows of a multiple of 16 bytes: 8 numbers of bf16."""


def grouped_linear(x_RI: Tensor, weight_EOI: Tensor, rows_E: Tensor) -> Tensor:
    """Multiply the first rows_E[0] rows by expert 0's matrix, the next rows_E[1] by expert 1's, ...: [R, O]."""
    if _fits_one_launch(x_RI, weight_EOI):
        return _OneLaunch.apply(x_RI, weight_EOI, rows_E.cumsum(0, dtype=torch.int32))
    return _ExpertByExpert.apply(x_RI, weight_EOI, rows_E.tolist())


def _fits_one_launch(x_RI: Tensor, weight_EOI: Tensor) -> bool:
    is_bf16 = x_RI.dtype == weight_EOI.dtype == torch.bfloat16
    return x_RI.is_cuda and is_bf16 and not any(size % _ALIGNED_COLUMNS for size in weight_EOI.shape[1:])


class _OneLaunch(torch.autograd.Function):
    """torch._grouped_mm; `ends_E` holds for each expert the row behind its last one, int32."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_RI, weight_EOI, ends_E)
        return torch._grouped_mm(x_RI, weight_EOI.transpose(1, 2), offs=ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_RI, weight_EOI, ends_E = ctx.saved_tensors
        grad_RO = grad_RO.contiguous()
        grad_x = torch._grouped_mm(grad_RO, weight_EOI, offs=ends_E) if ctx.needs_input_grad[0] else None
        grad_weight = torch._grouped_mm(grad_RO.t(), x_RI, offs=ends_E) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None


class _ExpertByExpert(torch.autograd.Function):
    """Every product writes straight into its part of one buffer.

    Autograd's own way (index the stacked weight, concatenate the outputs) adds one copy of the activations and,
    in the backward pass, one of all experts' gradients.
    """

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight_EOI: Tensor, rows_E: list[int]) -> Tensor:
        ctx.save_for_backward(x_RI, weight_EOI)
        ctx.rows_E = rows_E
        out_RO = x_RI.new_empty(x_RI.shape[0], weight_EOI.shape[1])
        for expert, rows in _slices(rows_E):
            torch.mm(x_RI[rows], weight_EOI[expert].t(), out=out_RO[rows])
        return out_RO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_RI, weight_EOI = ctx.saved_tensors
        grad_x = torch.empty_like(x_RI) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight_EOI) if ctx.needs_input_grad[1] else None
        for expert, rows in _slices(ctx.rows_E):
            if grad_x is not None:
                torch.mm(grad_RO[rows], weight_EOI[expert], out=grad_x[rows])
            if grad_weight is not None:
                # An expert without rows gets zeros: a product over no rows is zero.
                torch.mm(grad_RO[rows].t(), x_RI[rows], out=grad_weight[expert])
        return grad_x, grad_weight, None


def _slices(rows_E: list[int]) -> list[tuple[int, slice]]:
    slices, start = [], 0
    for expert, count in enumerate(rows_E):
        slices.append((expert, slice(start, start + count)))
        start += count
    return slices
