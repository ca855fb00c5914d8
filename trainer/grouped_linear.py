"""One matrix an expert, applied to rows that are sorted by expert, and one vector an expert added to them.

On a GPU in bf16 it is one launch of a grouped product, and the row counts stay on the device. Elsewhere it is a product
an expert.

Shapes: R routed rows, E experts, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ckptbridge.kernels.backend import Backend
from ckptbridge.kernels.experts import ProductsConfig, weight_gradient
from ckptbridge.kernels.grouped_backend import ProductsBackend
from ckptbridge.kernels.grouped_gemm import grouped_matmul, grouped_weight_gradient
from ckptbridge.kernels.main_gradient import main_gradient_of


def grouped_linear(
    x_RI: Tensor,
    weight_EOI: Tensor,
    ends_E: Tensor,
    backend: Backend = "reference",
    products: ProductsBackend | Literal["auto"] = "auto",
    bias_EO: Tensor | None = None,
) -> Tensor:
    """Multiply rows up to ends_E[0] by expert 0's matrix, from there up to ends_E[1] by expert 1's, ...: [R, O].

    Rows from ends_E[-1] on hold anything. To each row its expert's row of `bias_EO` is added. `backend` names who may
    compute the products, `products` who does. Gradients of weight and bias are summed in fp32, and added to their main
    gradients where they have them.
    """
    config = ProductsConfig.from_shape(backend, x_RI, weight_EOI, products=products)
    out_RO = _GroupedLinear.apply(x_RI, weight_EOI, ends_E, config)
    return out_RO if bias_EO is None else out_RO + _Biases.apply(bias_EO, ends_E, out_RO.shape[0], config)


class _Biases(torch.autograd.Function):
    """The bias of each row's expert [R, O]; zeros from ends_E[-1] on, whose gradients are nobody's.

    The sum over an expert's rows is a product with a matrix of ones: autograd's own rounds to bf16 at every row, and
    with 4,096 rows an expert was a tenth off.
    """

    @staticmethod
    def forward(ctx: Any, bias_EO: Tensor, ends_E: Tensor, rows: int, config: ProductsConfig) -> Tensor:
        ctx.save_for_backward(ends_E)
        ctx.main, ctx.dtype = main_gradient_of(bias_EO), bias_EO.dtype
        # Of others' products none was held to so narrow a matrix.
        ctx.backend = config.weight_gradient if config.weight_gradient in ("reference", "triton") else "torch"
        experts_R = torch.searchsorted(ends_E, torch.arange(rows, dtype=ends_E.dtype, device=ends_E.device), right=True)
        return F.pad(bias_EO, (0, 0, 0, 1))[experts_R]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_RO: Tensor) -> tuple[Tensor | None, None, None, None]:
        (ends_E,) = ctx.saved_tensors
        ones_R8 = d_RO.new_ones(d_RO.shape[0], 8)  # the copy engine's least: 16 bytes of bf16
        wide = torch.promote_types(d_RO.dtype, torch.float32)
        sums_EO8 = d_RO.new_empty(ends_E.shape[0], d_RO.shape[1], 8, dtype=wide)
        grouped_weight_gradient(d_RO.contiguous(), ones_R8, ends_E, sums_EO8, accumulate=False, backend=ctx.backend)
        if ctx.main is None:
            return sums_EO8[..., 0].to(ctx.dtype), None, None, None
        ctx.main.add(sums_EO8[..., 0])
        return None, None, None, None


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor, config: ProductsConfig) -> Tensor:
        ctx.config = config
        ctx.main = main_gradient_of(weight_EOI)
        ctx.save_for_backward(x_RI, weight_EOI, ends_E)
        return grouped_matmul(x_RI, weight_EOI, ends_E, transposed=True, backend=config.matmul)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_RO: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_RI, weight_EOI, ends_E = ctx.saved_tensors
        d_RO, config = d_RO.contiguous(), ctx.config
        dx = d_weight = None
        if ctx.needs_input_grad[0]:
            dx = grouped_matmul(d_RO, weight_EOI, ends_E, transposed=False, backend=config.matmul)
        if ctx.needs_input_grad[1]:
            d_weight = weight_gradient(d_RO, x_RI, ends_E, weight_EOI, ctx.main, config)
        return dx, d_weight, None, None
