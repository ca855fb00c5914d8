"""Tokens to experts and back: rows are sorted by expert, and their outputs summed where the tokens stood.

Both directions gather in the forward and in the backward pass, so results do not depend on the order in
which threads finish (an index_add on a GPU would).

Shapes: T tokens, H hidden_size, E experts, K top-k, R = T*K routed rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, slots=True)
class Order:
    """Where each routed row goes. Row r of the sorted rows is choice order_R[r] % K of token order_R[r] // K."""

    order_R: Tensor
    inverse_R: Tensor
    rows_E: Tensor
    topk: int

    @staticmethod
    def of(experts_TK: Tensor, num_experts: int) -> Order:
        """Sort the choices by expert; within an expert tokens keep their order."""
        chosen_R = experts_TK.flatten()
        order_R = chosen_R.argsort(stable=True)
        inverse_R = torch.empty_like(order_R)
        inverse_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
        return Order(order_R, inverse_R, torch.bincount(chosen_R, minlength=num_experts), experts_TK.shape[1])


def dispatch(x_TH: Tensor, order: Order) -> Tensor:
    """The rows of `x_TH`, each K times, sorted by expert: [R, H]."""
    return _Dispatch.apply(x_TH, order)


def combine(y_RH: Tensor, weights_TK: Tensor, order: Order) -> Tensor:
    """The weighted sum of each token's K rows, in the dtype of `y_RH`: [T, H]."""
    return _Combine.apply(y_RH, weights_TK, order)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, order: Order) -> Tensor:
        ctx.order = order
        return x_TH[order.order_R // order.topk]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RH: Tensor) -> tuple[Tensor, None]:
        return grad_RH[ctx.order.inverse_R].unflatten(0, (-1, ctx.order.topk)).sum(1), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RH: Tensor, weights_TK: Tensor, order: Order) -> Tensor:
        y_TKH = y_RH[order.inverse_R].unflatten(0, (-1, order.topk))
        ctx.order = order
        ctx.save_for_backward(y_TKH, weights_TK)
        return (y_TKH * weights_TK.unsqueeze(-1)).sum(1).to(y_RH.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, Tensor, None]:
        y_TKH, weights_TK = ctx.saved_tensors
        order = ctx.order
        weights_R = weights_TK.flatten()[order.order_R].unsqueeze(-1)
        grad_y = (grad_TH[order.order_R // order.topk] * weights_R).to(y_TKH.dtype)
        grad_weights = (y_TKH * grad_TH.unsqueeze(1)).sum(-1, dtype=weights_TK.dtype)
        return grad_y, grad_weights, None
