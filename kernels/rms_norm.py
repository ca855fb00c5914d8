"""Residual add and RMSNorm in one pass: `summed = x + residual`, `normed = weight * summed / rms(summed)`.

The arithmetic inside is fp32. The rounding order is that of Hugging Face's LlamaRMSNorm behind its decoder layer:
`summed` is rounded to the dtype of x, the norm is taken of that rounded sum, the normalised rows are rounded to the
dtype of x, multiplied by the weight, and rounded once more. One thing differs: with an fp32 weight and bf16 x Hugging
Face returns fp32; here the output has the dtype of x.

Memory-bound. Floor, in passes of R x H over HBM: forward 4 (read x and residual, write normed and summed; 2 without a
residual), backward 4 (read summed and both gradients, write the gradient that x and residual share; 3 without).
"""

# Shapes: R rows (tokens, or tokens x heads), H the width that is normalised, P programs of the backward pass.

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ckptbridge.kernels.arguments import check_shape, check_tensor
from ckptbridge.kernels.backend import Backend, compiled, jit, num_multiprocessors, require_backend, tl
from ckptbridge.kernels.main_gradient import main_gradient_of

# A row lives in the registers of one program. In the backward pass ptxas spills 18 of them at 16384 and 106 at 32768.
MAX_WIDTH = 16384
_SHARED_NBYTES = 200 << 10
"""Of a Hopper multiprocessor's 227 KiB of shared memory, what tiles under way may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RmsNormConfig:
    """Launch knobs. A program works on a tile of `block_rows` x `block_width` elements that holds whole rows."""

    block_rows: int
    block_width: int
    num_warps_forward: int
    num_warps_backward: int
    # The backward pass is a fixed number of programs that stride over the rows, each with its own sum of dweight,
    # which costs 8 H bytes of traffic. One a multiprocessor with more tiles under way beat two to four on an H200 at
    # every width (H = 7168: 229 us against 239, 243 and 250).
    programs_per_multiprocessor: int = 1
    # Tiles under way in a backward program: the next ones are copied to shared memory while one is worked on. Measured
    # on an H200, bf16: 4 at widths up to 4096 (136 us; 2 took 150), 3 above (H = 8192: 261 us; 2 took 322, 4 took 266).
    num_stages_backward: int = 2

    @classmethod
    def from_shape(cls, hidden_size: int, itemsize: int = 2) -> RmsNormConfig:
        """Knobs for rows of `hidden_size` elements of `itemsize` bytes."""
        block_width = 1 << (hidden_size - 1).bit_length()  # Triton's blocks are powers of two
        # Narrow rows (q and k norms: 128) are grouped, or a program would not fill one 16-byte load a thread.
        tile = max(block_width, 4096)
        wanted_stages = 4 if tile == 4096 else 3
        stages_that_fit = _SHARED_NBYTES // (3 * tile * itemsize)  # summed and both gradients
        return cls(
            block_rows=tile // block_width,
            block_width=block_width,
            # 32 elements a thread: four 16-byte loads of bf16 under way from each input.
            num_warps_forward=tile // 1024,
            # 16 elements a thread: the sum of dweight and the weight stay in registers beside the tile.
            num_warps_backward=tile // 512,
            num_stages_backward=max(2, min(wanted_stages, stages_that_fit)),
        )


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition; autograd differentiates it. Also takes fp64, which then is fp64 throughout."""
    summed = x if residual is None else x + residual
    wide = summed.to(torch.promote_types(summed.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normed = (weight * normed.to(x.dtype)).to(x.dtype)
    return normed if residual is None else (normed, summed)


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: None = None,
    *,
    backend: Backend = ...,
    config: RmsNormConfig | None = ...,
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor,
    *,
    backend: Backend = ...,
    config: RmsNormConfig | None = ...,
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    *,
    backend: Backend = "reference",
    config: RmsNormConfig | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise each row of x, or of x + residual; with a residual also return that sum, the new residual stream.

    x and residual: [..., H], contiguous, fp32 or bf16, of one dtype and shape. weight: [H], fp32 or bf16.
    Returns normed, or (normed, summed), in the dtype and shape of x. Every input and both outputs carry gradients; of
    the triton backend the weight's goes to its main gradient where it has one.
    `config` overrides the launch knobs of the triton backend. Raises ValueError for arguments that do not fit
    and BackendError when `backend` cannot run on the device of x.
    """
    check_tensor("rms_norm", "x", x)
    check_tensor("rms_norm", "weight", weight, like=x)
    if x.ndim == 0 or not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"rms_norm: x: expected rows of 1 to {MAX_WIDTH} elements, found shape {tuple(x.shape)}")
    check_shape("rms_norm", "weight", weight, (x.shape[-1],), "the width of x")
    if residual is not None:
        check_tensor("rms_norm", "residual", residual, like=x)
        check_shape("rms_norm", "residual", residual, tuple(x.shape), "that of x")
        if residual.dtype != x.dtype:
            raise ValueError(f"rms_norm: residual: expected dtype {x.dtype} of x, found {residual.dtype}")
    require_backend(backend, x.device)
    if backend == "reference":
        return rms_norm_reference(x, weight, eps, residual)
    if backend == "torch":
        return compiled(rms_norm_reference)(x, weight, eps, residual)
    return _RmsNorm.apply(x, weight, eps, residual, config or RmsNormConfig.from_shape(x.shape[-1], x.element_size()))


class _RmsNorm(torch.autograd.Function):
    """The triton backend. Keeps the rounded sum (or x) and 1/rms of each row; never writes into what it keeps."""

    @staticmethod
    def forward(ctx, x, weight, eps, residual, config):
        H = x.shape[-1]
        R = x.numel() // H
        normed = torch.empty_like(x)
        summed = x if residual is None else torch.empty_like(x)
        inverse_rms = torch.empty(R, dtype=torch.float32, device=x.device)
        if R > 0:
            _forward_kernel[(-(-R // config.block_rows),)](
                x,
                residual,
                weight,
                normed,
                summed,
                inverse_rms,
                R,
                eps,
                H=H,
                BLOCK_R=config.block_rows,
                BLOCK_H=config.block_width,
                num_warps=config.num_warps_forward,
            )
        ctx.config = config
        ctx.has_residual = residual is not None
        ctx.main_gradient = main_gradient_of(weight)
        ctx.set_materialize_grads(False)  # an output nobody used costs no pass over zeros
        ctx.save_for_backward(summed, weight, inverse_rms)
        return (normed, summed) if ctx.has_residual else normed

    @staticmethod
    @once_differentiable
    def backward(ctx, d_normed, d_summed=None):
        summed, weight, inverse_rms = ctx.saved_tensors
        if d_normed is None:  # only the residual stream was used, and it passes gradients through
            return d_summed, None, None, d_summed if ctx.has_residual else None, None
        config = ctx.config
        H = summed.shape[-1]
        R = inverse_rms.numel()
        d_normed = d_normed.contiguous()
        d_summed = None if d_summed is None else d_summed.contiguous()
        dx = torch.empty_like(summed)
        P = min(
            -(-R // config.block_rows),
            config.programs_per_multiprocessor * num_multiprocessors(summed.device),
        )
        partial_dweight = None
        if ctx.needs_input_grad[1]:
            partial_dweight = torch.empty(P, H, dtype=torch.float32, device=summed.device)
        if P > 0:
            _backward_kernel[(P,)](
                summed,
                weight,
                inverse_rms,
                d_normed,
                d_summed,
                dx,
                partial_dweight,
                R,
                H=H,
                BLOCK_R=config.block_rows,
                BLOCK_H=config.block_width,
                NUM_STAGES=config.num_stages_backward,
                num_warps=config.num_warps_backward,
            )
        # One row of sums a program and a fixed order of rows and of this sum: the same bits at every run on a device.
        dweight = None if partial_dweight is None else partial_dweight.sum(0)
        if dweight is not None and ctx.main_gradient is not None:
            ctx.main_gradient.add(dweight)
            dweight = None
        dweight = None if dweight is None else dweight.to(weight.dtype)
        return dx, dweight, None, dx if ctx.has_residual else None, None


@jit
def _forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    normed_ptr,
    summed_ptr,
    inverse_rms_ptr,
    R,
    eps,
    H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_H)
    mask = (rows < R)[:, None] & (columns < H)[None, :]
    offsets = rows.to(tl.int64)[:, None] * H + columns[None, :]  # R x H passes 2**31 in real runs

    summed = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        summed += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        rounded = summed.to(summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + offsets, rounded, mask=mask)
        summed = rounded.to(tl.float32)

    inverse_rms = tl.rsqrt(tl.sum(summed * summed, 1) / H + eps)
    tl.store(inverse_rms_ptr + rows, inverse_rms, mask=rows < R)
    weight = tl.load(weight_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)
    normed = (summed * inverse_rms[:, None]).to(normed_ptr.dtype.element_ty).to(tl.float32)
    tl.store(normed_ptr + offsets, (normed * weight[None, :]).to(normed_ptr.dtype.element_ty), mask=mask)


@jit
def _backward_kernel(
    summed_ptr,
    weight_ptr,
    inverse_rms_ptr,
    d_normed_ptr,
    d_summed_ptr,
    dx_ptr,
    partial_dweight_ptr,
    R,
    H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK_H)
    weight = tl.load(weight_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_R, BLOCK_H], dtype=tl.float32)

    for tile in tl.range(program, tl.cdiv(R, BLOCK_R), tl.num_programs(0), num_stages=NUM_STAGES):
        rows = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = (rows < R)[:, None] & (columns < H)[None, :]
        offsets = rows.to(tl.int64)[:, None] * H + columns[None, :]
        summed = tl.load(summed_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        d_normed = tl.load(d_normed_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        inverse_rms = tl.load(inverse_rms_ptr + rows, mask=rows < R, other=0.0)[:, None]

        normed = summed * inverse_rms
        # The weight met the rounded rows in the forward pass.
        dweight += d_normed * normed.to(summed_ptr.dtype.element_ty).to(tl.float32)
        d_normed *= weight[None, :]
        projection = tl.sum(d_normed * normed, 1)[:, None] / H
        dx = inverse_rms * (d_normed - normed * projection)
        if d_summed_ptr is not None:
            dx += tl.load(d_summed_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)

    if partial_dweight_ptr is not None:
        tl.store(partial_dweight_ptr + program * H + columns, tl.sum(dweight, 0), mask=columns < H)
