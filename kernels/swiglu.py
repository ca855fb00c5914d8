"""SwiGLU over packed [gate_proj; up_proj] rows: `out = silu(x[:, :F]) * x[:, F:]`.

The arithmetic inside is fp32 and the result is rounded once, to the dtype of x. (Hugging Face's MLP also rounds
silu(gate_proj) to bf16, before the product; in fp32 the two are equal.)

Memory-bound. Floor, in passes of R x F over HBM: forward 3 (read gate_proj and up_proj, write out), backward 5 (read
gate_proj, up_proj and the gradient of out, write both halves of the gradient of x). Nothing but x is kept for the
backward pass, which computes the sigmoid again: cheaper than 2 more passes. x is left as it was, unless the caller
gives it away: then its gradient takes its place, and the backward pass allocates nothing.
"""

# Shapes: R rows (tokens, or routed rows), F the width of a half (ffn_hidden_size, moe_ffn_hidden_size).

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ckptbridge.kernels.arguments import check_tensor
from ckptbridge.kernels.backend import Backend, compiled, jit, require_backend, tl
from ckptbridge.kernels.backward_once import refuse_second_backward


@dataclass(frozen=True, slots=True, kw_only=True)
class SwigluConfig:
    """Launch knobs. A program works on a tile of `block_rows` rows x `block_width` columns of each half."""

    block_rows: int
    block_width: int
    num_warps: int = 4

    @classmethod
    def from_shape(cls, ffn_hidden_size: int) -> SwigluConfig:
        """Knobs for halves of `ffn_hidden_size` elements."""
        # 16 elements a thread of 4 warps: two 16-byte loads of bf16 under way from each half, no more registers
        # than 16 programs a multiprocessor may have, which keeps it full.
        tile = 2048
        # The widest power of two that divides F leaves no lane idle (F = 768: 256, 2560: 512, 14336: 2048).
        # Below 64 elements a row's piece is shorter than a 128-byte line; then rather idle lanes at the row's end.
        block_width = min(ffn_hidden_size & -ffn_hidden_size, tile)
        if block_width < 64:
            block_width = min(1 << (ffn_hidden_size - 1).bit_length(), 1024)
        return cls(block_rows=tile // block_width, block_width=block_width)


def swiglu_reference(x: Tensor) -> Tensor:
    """The definition; autograd differentiates it. Also takes fp64, which then is fp64 throughout."""
    gate_proj, up_proj = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    return (torch.nn.functional.silu(gate_proj) * up_proj).to(x.dtype)


def swiglu(
    x: Tensor, *, overwrites_x: bool = False, backend: Backend = "reference", config: SwigluConfig | None = None
) -> Tensor:
    """silu of the first half of each row times the second half.

    x: [..., 2F], contiguous, fp32 or bf16. Returns [..., F] in the dtype of x. `overwrites_x` lets the triton backend
    write the gradient of x over x in the backward pass: for an x that nothing reads after that, and a graph that is
    gone through once (a second time raises RuntimeError). `config` overrides the launch knobs of the triton backend.
    Raises ValueError for an argument that does not fit and BackendError when `backend` cannot run on the device of x.
    """
    check_tensor("swiglu", "x", x)
    if x.ndim == 0 or x.shape[-1] < 2 or x.shape[-1] % 2:
        raise ValueError(
            f"swiglu: x: expected rows of [gate_proj; up_proj], an even width of at least 2, "
            f"found shape {tuple(x.shape)}"
        )
    require_backend(backend, x.device)
    if backend == "reference":
        return swiglu_reference(x)
    if backend == "torch":
        return compiled(swiglu_reference)(x)
    return _Swiglu.apply(x, overwrites_x, config or SwigluConfig.from_shape(x.shape[-1] // 2))


class _Swiglu(torch.autograd.Function):
    """The triton backend. Keeps x alone."""

    @staticmethod
    def forward(ctx, x, overwrites_x, config):
        ctx.config, ctx.overwrites_x = config, overwrites_x
        ctx.save_for_backward(x)
        out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        _launch(_forward_kernel, config, out.shape[-1], x, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        if ctx.overwrites_x:
            refuse_second_backward(ctx, "swiglu")
        (x,) = ctx.saved_tensors
        dx = x.detach() if ctx.overwrites_x else torch.empty_like(x)
        _launch(_backward_kernel, ctx.config, d_out.shape[-1], x, d_out.contiguous(), dx)
        if ctx.overwrites_x:
            torch.autograd.graph.increment_version(x)  # the kernel wrote behind autograd's back
        return dx, None, None


def _launch(kernel, config: SwigluConfig, F: int, x: Tensor, *others: Tensor) -> None:
    """Run an elementwise kernel over all tiles of the rows of x."""
    R = x.numel() // (2 * F)
    tiles = -(-R // config.block_rows) * -(-F // config.block_width)
    if tiles > 0:
        kernel[(tiles,)](
            x,
            *others,
            R,
            F=F,
            BLOCK_R=config.block_rows,
            BLOCK_F=config.block_width,
            num_warps=config.num_warps,
        )


@jit
def _tile(R, F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr):
    """Rows (int64: R x 2F passes 2**31 in real runs), columns and mask of this program's tile."""
    program = tl.program_id(0)
    tiles_in_a_row = (F + BLOCK_F - 1) // BLOCK_F  # neighbouring programs read neighbouring columns
    rows = (program // tiles_in_a_row) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = (program % tiles_in_a_row) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (rows < R)[:, None] & (columns < F)[None, :]
    return rows.to(tl.int64)[:, None], columns[None, :], mask


@jit
def _forward_kernel(x_ptr, out_ptr, R, F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr):
    rows, columns, mask = _tile(R, F, BLOCK_R, BLOCK_F)
    packed = x_ptr + rows * (2 * F) + columns
    gate_proj = tl.load(packed, mask=mask, other=0.0).to(tl.float32)
    up_proj = tl.load(packed + F, mask=mask, other=0.0).to(tl.float32)
    out = gate_proj * tl.sigmoid(gate_proj) * up_proj
    tl.store(out_ptr + rows * F + columns, out.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _backward_kernel(x_ptr, d_out_ptr, dx_ptr, R, F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr):
    rows, columns, mask = _tile(R, F, BLOCK_R, BLOCK_F)
    packed = rows * (2 * F) + columns
    gate_proj = tl.load(x_ptr + packed, mask=mask, other=0.0).to(tl.float32)
    up_proj = tl.load(x_ptr + packed + F, mask=mask, other=0.0).to(tl.float32)
    d_out = tl.load(d_out_ptr + rows * F + columns, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate_proj)
    d_gate_proj = d_out * up_proj * sigmoid * (1 + gate_proj * (1 - sigmoid))
    d_up_proj = d_out * gate_proj * sigmoid
    tl.store(dx_ptr + packed, d_gate_proj.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dx_ptr + packed + F, d_up_proj.to(dx_ptr.dtype.element_ty), mask=mask)
