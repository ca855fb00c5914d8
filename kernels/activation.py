"""What stands between an expert's two matrices, and its backward pass with the weights of the choices in one kernel.

A choice's weight scales what its expert gives, and its gradient needs no expert's output: with d = d_out @ fc2, the
gradient that arrives at the hidden units a before the weight, it is <d, a>, for <d_out, fc2 @ a> = <d_out @ fc2, a>.
So one kernel reads what fc1 gave and d, and writes in their places the gradient for fc1, and weight * a, of which the
gradient of fc2 is a product. The arithmetic inside is fp32; every result is rounded once.

Memory-bound. Floor, in passes of R x F over HBM: swiglu forward 3, backward 6 (read gate_proj, up_proj and d, write all
three); squared_relu forward 2, backward 4.
"""

# Shapes: T tokens, K top-k, R routed rows, F ffn width of an expert, O rows of fc1: 2F [gate_proj; up_proj], or F.

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ckptbridge.kernels.backend import Backend, compiled, jit, tl
from ckptbridge.kernels.gather import weights_by_row
from ckptbridge.kernels.swiglu import SwigluConfig, swiglu, swiglu_reference

Activation = Literal["swiglu", "squared_relu"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


def fc1_outputs(activation: Activation, F: int) -> int:
    """How many numbers fc1 gives for F hidden units."""
    return 2 * F if activation == "swiglu" else F


def squared_relu_reference(x: Tensor) -> Tensor:
    """The definition; autograd differentiates it. Also takes fp64, which then is fp64 throughout."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).relu().square().to(x.dtype)


def activate_reference(h_RO: Tensor, activation: Activation) -> Tensor:
    """The definition of either function; autograd differentiates it."""
    return swiglu_reference(h_RO) if activation == "swiglu" else squared_relu_reference(h_RO)


@torch.no_grad()
def activate(h_RO: Tensor, activation: Activation, *, backend: Backend) -> Tensor:
    """Hidden units [R, F] from what fc1 gave. Autograd does not see it."""
    if activation == "swiglu":
        return swiglu(h_RO, backend=backend)
    if backend != "triton":
        definition = compiled(squared_relu_reference) if backend == "torch" else squared_relu_reference
        return definition(h_RO)
    out = torch.empty_like(h_RO)
    if out.numel() > 0:
        _squared_relu_kernel[(-(-out.numel() // 2048),)](h_RO, out, out.numel(), BLOCK=2048)
    return out


@torch.no_grad()
def activate_backward(
    h_RO: Tensor,
    d_RF: Tensor,
    rows_TK: Tensor,
    weights_TK: Tensor,
    activation: Activation,
    *,
    backend: Backend,
    config: SwigluConfig | None = None,
) -> Tensor:
    """Replace h by its gradient and d, the hidden units' gradient without the weight, by weight * hidden units.

    Returns the gradient of the weights, [T, K] fp32, zero for dropped choices. Rows of padding stay the zeros that they
    are in both; unused rows hold anything. `config` overrides the launch knobs of the triton backend.
    """
    if backend != "triton":
        definition = compiled(_backward_reference) if backend == "torch" else _backward_reference
        return definition(h_RO, d_RF, rows_TK, weights_TK, activation)
    F = d_RF.shape[1]
    config = config or SwigluConfig.from_shape(F)
    d_weights_TK = torch.empty_like(weights_TK)
    if rows_TK.numel() > 0:
        _backward_kernel[(-(-rows_TK.numel() // config.block_rows),)](
            h_RO,
            d_RF,
            weights_TK,
            rows_TK,
            d_weights_TK,
            rows_TK.numel(),
            F=F,
            IS_SWIGLU=activation == "swiglu",
            BLOCK_C=config.block_rows,
            BLOCK_F=config.block_width,
            num_warps=config.num_warps,
        )
    torch.autograd.graph.increment_version((h_RO, d_RF))  # a kernel writes behind autograd's back
    return d_weights_TK


def _backward_reference(
    h_RO: Tensor, d_RF: Tensor, rows_TK: Tensor, weights_TK: Tensor, activation: Activation
) -> Tensor:
    d, weights_R1 = d_RF.float(), weights_by_row(rows_TK, weights_TK, d_RF.shape[0])
    if activation == "swiglu":
        gate_proj, up_proj = h_RO.float().chunk(2, -1)
        sigmoid = gate_proj.sigmoid()
        silu = gate_proj * sigmoid
        hidden_RF = silu * up_proj
        slope = torch.cat([up_proj * sigmoid * (1 + gate_proj * (1 - sigmoid)), silu], -1)
        d_h = slope * (weights_R1 * d).repeat(1, 2)
    else:
        positive = h_RO.float().relu()
        hidden_RF = positive.square()
        d_h = 2 * positive * (weights_R1 * d)
    products_R = (d * hidden_RF).sum(-1)
    h_RO.copy_(d_h)
    d_RF.copy_(weights_R1 * hidden_RF)
    return products_R[rows_TK.clamp(min=0)].masked_fill(rows_TK < 0, 0)


@jit
def _squared_relu_kernel(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.maximum(tl.load(x_ptr + places, mask=places < count, other=0.0).to(tl.float32), 0.0)
    tl.store(out_ptr + places, (x * x).to(out_ptr.dtype.element_ty), mask=places < count)


@jit
def _backward_kernel(
    h_ptr,
    d_ptr,
    weights_ptr,
    rows_ptr,
    d_weights_ptr,
    choices_count,
    F: tl.constexpr,
    IS_SWIGLU: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    # Choice by choice, not row by row: weights are read and their gradients written where they stand. The rows of
    # neighbouring tokens at one expert are neighbours, so memory is still read in long runs.
    choices = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = tl.load(rows_ptr + choices, mask=choices < choices_count, other=-1)
    weights = tl.load(weights_ptr + choices, mask=rows >= 0, other=0.0)[:, None]
    rows_int64 = rows.to(tl.int64)[:, None]  # R x 2F passes 2**31 in real runs
    products = tl.zeros([BLOCK_C, BLOCK_F], dtype=tl.float32)
    for start in range(0, F, BLOCK_F):
        columns = start + tl.arange(0, BLOCK_F)[None, :]
        mask = (rows >= 0)[:, None] & (columns < F)
        d_places = d_ptr + rows_int64 * F + columns
        d = tl.load(d_places, mask=mask, other=0.0).to(tl.float32)
        if IS_SWIGLU:
            gate_places = h_ptr + rows_int64 * (2 * F) + columns
            gate_proj = tl.load(gate_places, mask=mask, other=0.0).to(tl.float32)
            up_proj = tl.load(gate_places + F, mask=mask, other=0.0).to(tl.float32)
            sigmoid = tl.sigmoid(gate_proj)
            silu = gate_proj * sigmoid
            hidden = silu * up_proj
            scaled = weights * d
            d_gate_proj = scaled * up_proj * sigmoid * (1 + gate_proj * (1 - sigmoid))
            tl.store(gate_places, d_gate_proj.to(h_ptr.dtype.element_ty), mask=mask)
            tl.store(gate_places + F, (scaled * silu).to(h_ptr.dtype.element_ty), mask=mask)
        else:
            places = h_ptr + rows_int64 * F + columns
            positive = tl.maximum(tl.load(places, mask=mask, other=0.0).to(tl.float32), 0.0)
            hidden = positive * positive
            tl.store(places, (2 * weights * d * positive).to(h_ptr.dtype.element_ty), mask=mask)
        products += d * hidden
        tl.store(d_places, (weights * hidden).to(d_ptr.dtype.element_ty), mask=mask)
    tl.store(d_weights_ptr + choices, tl.sum(products, 1), mask=choices < choices_count)
