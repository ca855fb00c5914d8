"""A linear layer whose weight's gradient goes where it is summed: `out = x @ weight.T + bias`.

The forward product is torch's own. In the backward pass the gradient of a weight with a main gradient is added to it
inside the matrix product, in fp32, and autograd is given none: no gradient in the weight's dtype is ever written, and
no pass adds it up. A weight without one is plain autograd's.
"""

# Shapes: T rows, I inputs, O outputs.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ckptbridge.kernels.main_gradient import MainGradient, main_gradient_of


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I] times weight [O, I] transposed, plus bias [O]: [..., O] in the dtype of x.

    The gradients of a weight and of a bias that have a main gradient are added to it.
    """
    main = main_gradient_of(weight)
    if main is None or not (weight.requires_grad and torch.is_grad_enabled()):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias, main, None if bias is None else main_gradient_of(bias))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        main_weight: MainGradient,
        main_bias: MainGradient | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.main_weight, ctx.main_bias = main_weight, main_bias
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        d_out_TO = d_out.reshape(-1, weight.shape[0])
        dx = (d_out_TO @ weight).view(x.shape) if wants_x else None
        if wants_weight:
            ctx.main_weight.add_product(d_out_TO.t(), x.reshape(-1, weight.shape[1]))
        d_bias = None
        if wants_bias and ctx.main_bias is None:
            d_bias = d_out_TO.sum(0)
        elif wants_bias:
            ctx.main_bias.add(d_out_TO.sum(0, dtype=torch.promote_types(d_out.dtype, torch.float32)))
        return dx, None, d_bias, None, None
