"""The routed experts of a mixture as one operation: `out[t] = sum over k of weight[t, k] * fc2 @ f(fc1 @ x[t])`.

What is kept for the backward pass is x, what fc1 gave, and the order of the rows: T H + R O numbers, whatever the
number of experts that a token meets. Nothing of the width of R x H outlives the product that reads it. The backward
pass gathers x and the output's gradient again, and writes fc1's gradient over what fc1 gave: a second backward pass
through the same graph is refused.

The weight of a choice is applied where the rows are summed, in fp32, and in the backward pass between the matrices:
there its own gradient comes for nothing (see `activation.py`), and no expert's output is kept for it.

Compute-bound: forward 2 R H (O + F) operations, backward twice as many. Around the products, in passes over HBM:
gather x (T + R of H), the activation (R of O + F), sum (R + T of H); backward the gathers of x and of the output's
gradient, R of 2 (O + F) between the matrices, and one sum.
"""

# Shapes: T tokens, K top-k, R routed rows, E experts, H hidden_size, F ffn width of an expert, O rows of fc1: 2F for a
# gated unit [gate_proj; up_proj], else F.

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ckptbridge.kernels.activation import (
    ACTIVATIONS,
    Activation,
    activate,
    activate_backward,
    activate_reference,
    fc1_outputs,
)
from ckptbridge.kernels.arguments import check_shape, check_tensor
from ckptbridge.kernels.backend import Backend, require_backend
from ckptbridge.kernels.backward_once import refuse_second_backward
from ckptbridge.kernels.gather import check_weights, gather_rows, gather_rows_reference, sum_rows, sum_rows_reference
from ckptbridge.kernels.grouped_backend import ProductsBackend
from ckptbridge.kernels.grouped_gemm import grouped_matmul, grouped_weight_gradient
from ckptbridge.kernels.main_gradient import MainGradient, main_gradient_of
from ckptbridge.kernels.order import Order

_NARROW = 1024
"""Experts up to this wide do so little with a row that copying it first costs more than reading it where it stands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductsConfig:
    """Who computes the grouped products: see the backends of `grouped_gemm.py`."""

    matmul: ProductsBackend
    weight_gradient: ProductsBackend
    gathers_forward: bool = False
    """fc1 reads the rows of x where they stand, instead of from a sorted copy. The triton products alone can."""
    gathers_gradient: bool = False
    """So do the two products of the output's gradient. That of x with fc1's always has its copy: see `from_shape`."""

    @classmethod
    def from_shape(
        cls, backend: Backend, rows: Tensor, *matrices: Tensor, products: ProductsBackend | Literal["auto"] = "auto"
    ) -> ProductsConfig:
        """The fastest that was measured for a device, dtype and shapes: `rows` [R, H] or [T, H], `matrices` [E, O, I].

        fc2's matrix comes last. `products` names who computes them instead; without a name our own products belong to
        the triton backend alone: others are what they are held to.

        Measured on an H200 (benchmarks/moe_layer.py, tune.py): our products beat torch's by 1 to 28 %, but for one of
        24 that is 1 % behind, and add to an fp32 gradient without a pass of their own. Reading rows where they stand
        costs a product 4 to 10 % of its rate and saves the copy: fc1 of experts of width 768 gains by it (1.29 ms
        against 1.34), of width 2560 and more it loses. The output's gradient is read by two products, which share a
        copy.
        """
        is_narrow = matrices[-1].shape[-1] <= _NARROW
        if products != "auto" and rows.shape[0]:
            return cls(matmul=products, weight_gradient=products, gathers_forward=products == "triton" and is_narrow)
        # One launch wants bf16 on a GPU, and rows of a multiple of 16 bytes.
        widths = [width for matrix in matrices for width in matrix.shape[1:]]
        is_one_launch = rows.is_cuda and rows.dtype == torch.bfloat16 and not any(width % 8 for width in widths)
        if not is_one_launch or rows.shape[0] == 0:
            return cls(matmul="reference", weight_gradient="reference")
        if backend != "triton" or torch.cuda.get_device_capability(rows.device) < (9, 0):
            return cls(matmul="torch", weight_gradient="torch")
        return cls(matmul="triton", weight_gradient="triton", gathers_forward=is_narrow)


def experts_reference(
    x_TH: Tensor, weights_TK: Tensor, order: Order, fc1_EOH: Tensor, fc2_EHF: Tensor, activation: Activation = "swiglu"
) -> Tensor:
    """The definition, an expert after another; autograd differentiates it. Also takes fp64 throughout."""
    x_RH = gather_rows_reference(x_TH, order.tokens_R)
    ends = order.ends_E.tolist()
    parts = [x_RH[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    y = [
        activate_reference(part @ fc1.t(), activation) @ fc2.t()
        for part, fc1, fc2 in zip(parts, fc1_EOH, fc2_EHF, strict=True)
    ]
    unused = x_RH.new_zeros(x_RH.shape[0] - (ends[-1] if ends else 0), x_RH.shape[1])
    return sum_rows_reference(torch.cat([*y, unused]), order.rows_TK, weights_TK)


def experts(
    x_TH: Tensor,
    weights_TK: Tensor,
    order: Order,
    fc1_EOH: Tensor,
    fc2_EHF: Tensor,
    *,
    activation: Activation = "swiglu",
    backend: Backend = "reference",
    config: ProductsConfig | None = None,
) -> Tensor:
    """Send each token through the experts of its choices and sum what they give, by weight: [T, H].

    x_TH: [T, H]; fc1_EOH: [E, O, H]; fc2_EHF: [E, H, F]; contiguous, all fp32 or all bf16. O is 2F, [gate_proj;
    up_proj], with the activation "swiglu", and F with "squared_relu". weights_TK: [T, K] fp32. All four carry
    gradients; those of fc1 and fc2 are added to their main gradients where they have one. Dropped choices add nothing.

    `backend` names the kernels around the products, `config` those of the products (default: what the device has).
    Raises ValueError for arguments that do not fit and BackendError when a backend cannot run on the device of x_TH.
    """
    _check(x_TH, weights_TK, order, fc1_EOH, fc2_EHF, activation)
    require_backend(backend, x_TH.device)
    config = config or ProductsConfig.from_shape(backend, x_TH, fc1_EOH, fc2_EHF)
    return _Experts.apply(x_TH, weights_TK, order, fc1_EOH, fc2_EHF, activation, backend, config)


def _check(
    x_TH: Tensor, weights_TK: Tensor, order: Order, fc1_EOH: Tensor, fc2_EHF: Tensor, activation: Activation
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"experts: activation: expected one of {', '.join(ACTIVATIONS)}; found {activation!r}")
    for name, tensor in (("x_TH", x_TH), ("fc1_EOH", fc1_EOH), ("fc2_EHF", fc2_EHF)):
        check_tensor("experts", name, tensor, like=x_TH)
        if tensor.dtype != x_TH.dtype:
            raise ValueError(f"experts: {name}: expected dtype {x_TH.dtype} of x_TH, found {tensor.dtype}")
    check_weights("experts", weights_TK, order)
    if fc2_EHF.ndim != 3:
        raise ValueError(f"experts: fc2_EHF: expected three dimensions, found shape {tuple(fc2_EHF.shape)}")
    E, H, F = fc2_EHF.shape
    check_shape("experts", "x_TH", x_TH, (order.rows_TK.shape[0], H), "a row for each token, the width of fc2_EHF")
    check_shape("experts", "fc1_EOH", fc1_EOH, (E, fc1_outputs(activation, F), H), f"that of fc2_EHF, {activation}")
    check_shape("experts", "order.ends_E", order.ends_E, (E,), "the experts of fc2_EHF")


class _Experts(torch.autograd.Function):
    """Keeps x and what fc1 gave; the backward pass writes into the latter."""

    @staticmethod
    def forward(ctx, x_TH, weights_TK, order, fc1_EOH, fc2_EHF, activation, backend, config):
        ctx.order, ctx.activation, ctx.backend, ctx.config = order, activation, backend, config
        ctx.main_gradients = main_gradient_of(fc1_EOH), main_gradient_of(fc2_EHF)
        x_RH, tokens_R = _rows_of(x_TH, order, backend, gathers=config.gathers_forward)
        h_RO = grouped_matmul(x_RH, fc1_EOH, order.ends_E, transposed=True, rows_R=tokens_R, backend=config.matmul)
        del x_RH
        # Nothing but the call holds what stands between the matrices.
        y_RH = grouped_matmul(
            activate(h_RO, activation, backend=backend), fc2_EHF, order.ends_E, transposed=True, backend=config.matmul
        )
        ctx.save_for_backward(x_TH, h_RO, weights_TK, fc1_EOH, fc2_EHF)
        return sum_rows(y_RH, order, weights_TK, backend=backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_TH):
        refuse_second_backward(ctx, "experts")
        x_TH, h_RO, weights_TK, fc1_EOH, fc2_EHF = ctx.saved_tensors
        order, backend, config = ctx.order, ctx.backend, ctx.config
        wants_x, _, _, wants_fc1, wants_fc2, *_ = ctx.needs_input_grad
        main_fc1, main_fc2 = ctx.main_gradients
        d_fc1 = d_fc2 = dx_TH = None

        d_TH = d_TH.contiguous()
        d_RH, tokens_R = _rows_of(d_TH, order, backend, gathers=config.gathers_gradient)
        d_RF = grouped_matmul(d_RH, fc2_EHF, order.ends_E, transposed=False, rows_R=tokens_R, backend=config.matmul)
        # From here on h is its gradient, and d the weighted hidden units.
        d_weights_TK = activate_backward(h_RO, d_RF, order.rows_TK, weights_TK, ctx.activation, backend=backend)
        if wants_fc2:
            d_fc2 = weight_gradient(d_RH, d_RF, order.ends_E, fc2_EHF, main_fc2, config, d_rows_R=tokens_R)
        del d_RH, d_RF

        if wants_fc1:
            x_RH, _ = _rows_of(x_TH, order, backend, gathers=False)
            d_fc1 = weight_gradient(h_RO, x_RH, order.ends_E, fc1_EOH, main_fc1, config)
            del x_RH
        if wants_x:
            dx_RH = grouped_matmul(h_RO, fc1_EOH, order.ends_E, transposed=False, backend=config.matmul)
            dx_TH = sum_rows(dx_RH, order, backend=backend)
        return dx_TH, d_weights_TK, None, d_fc1, d_fc2, None, None, None


def _rows_of(tokens_TH: Tensor, order: Order, backend: Backend, *, gathers: bool) -> tuple[Tensor, Tensor | None]:
    """What a product reads rows from, and the places of the rows in it; None if they stand in order."""
    return (tokens_TH, order.tokens_R) if gathers else (gather_rows(tokens_TH, order, backend=backend), None)


def weight_gradient(
    d: Tensor,
    x: Tensor,
    ends_E: Tensor,
    weight: Tensor,
    main: MainGradient | None,
    config: ProductsConfig,
    *,
    d_rows_R: Tensor | None = None,
) -> Tensor | None:
    """Add the gradient of stacked matrices to their main gradient, or return one in their dtype.

    Arguments as of `grouped_weight_gradient`.
    """
    if main is None and config.weight_gradient == "torch" and d_rows_R is None:
        return torch._grouped_mm(d.t(), x, offs=ends_E)  # as it comes: a copy into other memory is a pass over it
    out_EOI, accumulate = (torch.empty_like(weight), False) if main is None else main.target()
    squares = grouped_weight_gradient(
        d,
        x,
        ends_E,
        out_EOI,
        accumulate=accumulate,
        d_rows_R=d_rows_R,
        sums_squares=main is not None and main.wants_squares,
        backend=config.weight_gradient,
    )
    if main is None:
        return out_EOI
    main.squares = squares
    return None
