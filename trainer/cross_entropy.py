"""Next-token loss straight from hidden states: logits exist for a few hundred tokens at a time, and once.

Shapes: T tokens, H hidden_size, V vocab_size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_TOKENS = 256
"""At SmolLM2's 49,152 words a chunk of fp32 logits is 50 MB; at Qwen's 151,936 it is 156 MB."""


def linear_cross_entropy(hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, divisor: float = 1.0) -> Tensor:
    """The sum over tokens of -log softmax(hidden @ weight.T)[target], in nats, over `divisor`: an fp32 scalar.

    Logits are rounded to the dtype of `hidden_TH`, then the softmax is taken in fp32. When gradients are
    wanted they are computed here, chunk by chunk, so that no logits are kept or computed a second time.
    """
    if not torch.is_grad_enabled():  # ctx.needs_input_grad does not know
        hidden_TH, weight_VH = hidden_TH.detach(), weight_VH.detach()
    return _LinearCrossEntropy.apply(hidden_TH, weight_VH, targets_T, divisor)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, divisor: float) -> Tensor:
        wants_hidden, wants_weight, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden_TH) if wants_hidden else None
        grad_weight: Tensor | None = None
        loss = hidden_TH.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden_TH.shape[0], CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            hidden, targets = hidden_TH[rows], targets_T[rows].unsqueeze(1)
            log_probabilities = (hidden @ weight_VH.t()).log_softmax(1, dtype=torch.float32)
            loss -= log_probabilities.gather(1, targets).sum()
            if not (wants_hidden or wants_weight):
                continue
            probabilities = log_probabilities.exp_()
            probabilities.scatter_add_(1, targets, probabilities.new_full(targets.shape, -1.0))
            grad_logits = probabilities.div_(divisor).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight_VH, out=grad_hidden[rows])
            if wants_weight:
                grad_weight = _added(grad_weight, grad_logits.t(), hidden)
        ctx.grads = grad_hidden, grad_weight, weight_VH.dtype
        return loss / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, dtype = ctx.grads
        del ctx.grads
        # On a GPU reading the factor would wait for it; on a CPU it saves a pass over the largest gradient.
        if grad.device.type != "cpu" or grad.item() != 1.0:
            grad_hidden, grad_weight = (g if g is None else g.mul_(grad) for g in (grad_hidden, grad_weight))
        return grad_hidden, grad_weight if grad_weight is None else grad_weight.to(dtype), None, None


def _added(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """`total` plus a @ b, in fp32, in place where there is one."""
    if a.dtype != torch.float32:
        product = (a @ b).float()
        return product if total is None else total.add_(product)
    return a @ b if total is None else total.addmm_(a, b)
