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
from ckptbridge.kernels.grouped_gemm import grouped_matmul
from ckptbridge.kernels.main_gradient import main_gradient_of


def grouped_linear(
    x_RI: Tensor,
    weight_EOI: Tensor,
    ends_E: Tensor,
    backend: Backend = "reference",
    products: ProductsBackend | Literal["auto"] = "auto",
) -> Tensor:
    """Multiply rows up to ends_E[0] by expert 0's matrix, from there up to ends_E[1] by expert 1's, ...: [R, O].

    Rows from ends_E[-1] on hold anything. `backend` names who may compute the products, `products` who does. The
    weight's gradient is added to its main gradient where it has one.
    """
    config = ProductsConfig.from_shape(backend, x_RI, weight_EOI, products=products)
    return _GroupedLinear.apply(x_RI, weight_EOI, ends_E, config)


def biases(bias_EO: Tensor, ends_E: Tensor, rows: int) -> Tensor:
    """The bias of each row's expert: [R, O]; zeros from ends_E[-1] on, whose gradients are nobody's."""
    experts_R = torch.searchsorted(ends_E, torch.arange(rows, dtype=ends_E.dtype, device=ends_E.device), right=True)
    return F.pad(bias_EO, (0, 0, 0, 1))[experts_R]


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
