"""A router's logits in fp32 from bf16 tokens and weights, at the speed of bf16 products.

A product of two bf16 numbers is exact in fp32, so forward nothing is lost. Backward the gradient of the logits is
fp32: it is cut into two bf16 numbers, high and low, of which the second is what the first left over. Together they
keep 16 significant bits, and one matrix product takes both: [high | low] @ [weight; weight].
"""

# Shapes: T tokens, H hidden_size, E experts.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ckptbridge.kernels.arguments import check_shape, check_tensor
from ckptbridge.kernels.backend import Backend, jit, require_backend, tl
from ckptbridge.kernels.main_gradient import MainGradient, main_gradient_of

_BLOCK = 1024


def router_logits(x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor | None = None, *, backend: Backend) -> Tensor:
    """x [T, H] times weight [E, H] transposed, plus bias [E]: logits [T, E], fp32 whatever the inputs are.

    On the triton backend the gradient of a bf16 weight with a main gradient is added to it in fp32. Raises ValueError
    for arguments that do not fit and BackendError when `backend` cannot run on the device of x.
    """
    check_tensor("router_logits", "x_TH", x_TH)
    check_tensor("router_logits", "weight_EH", weight_EH, like=x_TH)
    if x_TH.ndim != 2 or weight_EH.ndim != 2 or x_TH.shape[1] != weight_EH.shape[1]:
        found = f"{tuple(x_TH.shape)} and {tuple(weight_EH.shape)}"
        raise ValueError(f"router_logits: x_TH, weight_EH: expected [T, H] and [E, H], found shapes {found}")
    if bias_E is not None:
        check_shape("router_logits", "bias_E", bias_E, (len(weight_EH),), "the rows of weight_EH")
    require_backend(backend, x_TH.device)
    is_bf16 = x_TH.dtype == weight_EH.dtype == torch.bfloat16
    if backend != "triton" or not is_bf16:
        return F.linear(x_TH.float(), weight_EH.float(), None if bias_E is None else bias_E.float())
    logits_TE = _RouterLogits.apply(x_TH, weight_EH, main_gradient_of(weight_EH))
    return logits_TE if bias_E is None else logits_TE + bias_E.float()


class _RouterLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, weight_EH: Tensor, main: MainGradient | None) -> Tensor:
        ctx.save_for_backward(x_TH, weight_EH)
        ctx.main = main
        return _product(x_TH, weight_EH.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logits_TE: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_TH, weight_EH = ctx.saved_tensors
        wants_x, wants_weight, _ = ctx.needs_input_grad
        E = len(weight_EH)
        halves_TE = _halves(d_logits_TE.contiguous())
        dx_TH = halves_TE @ torch.cat([weight_EH, weight_EH]) if wants_x else None
        if not wants_weight:
            return dx_TH, None, None
        d_weight_EH = _product(halves_TE.t(), x_TH)
        d_weight_EH = d_weight_EH[:E] + d_weight_EH[E:]
        if ctx.main is None:
            return dx_TH, d_weight_EH.to(weight_EH.dtype), None
        ctx.main.add(d_weight_EH)
        return dx_TH, None, None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of bf16 matrices in fp32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.mm(a.float(), b.float())


def _halves(x_TE: Tensor) -> Tensor:
    """[high | low], [T, 2E] in bf16, of an fp32 matrix."""
    T, E = x_TE.shape
    halves = torch.empty(T, 2 * E, dtype=torch.bfloat16, device=x_TE.device)
    if T > 0:
        _halves_kernel[(-(-x_TE.numel() // _BLOCK),)](x_TE, halves, x_TE.numel(), E=E, BLOCK=_BLOCK, num_warps=4)
    return halves


@jit
def _halves_kernel(x_ptr, halves_ptr, numel, E: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < numel, other=0.0)
    high = x.to(tl.bfloat16)
    low = (x - high.to(tl.float32)).to(tl.bfloat16)
    column = at + (at // E) * E
    tl.store(halves_ptr + column, high, mask=at < numel)
    tl.store(halves_ptr + column + E, low, mask=at < numel)
