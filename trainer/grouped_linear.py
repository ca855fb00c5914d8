"""One matrix an expert, applied to rows that are sorted by expert.

Shapes: R routed rows, E experts, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def grouped_linear(x_RI: Tensor, weight_EOI: Tensor, rows_E: list[int]) -> Tensor:
    """Multiply the first rows_E[0] rows by expert 0's matrix, the next rows_E[1] by expert 1's, ...: [R, O]."""
    return _GroupedLinear.apply(x_RI, weight_EOI, rows_E)


class _GroupedLinear(torch.autograd.Function):
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
