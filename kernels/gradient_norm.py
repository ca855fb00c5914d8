"""The norm of all gradients together, and what clipping multiplies them by; both stay on the device.

Two stages, so that the sum is the same at every run on a device: each program adds up the squares of a fixed share of
a buffer in fp32, then the shares are added in fp64. Nothing is scaled here: Adam multiplies by the coefficient as it
reads the gradient.

Memory-bound. Floor: 4 bytes an element, each gradient read once. What wrote a gradient may have squared it on the way:
of such a one the squares are taken and nothing is read.
"""

# Shapes: P programs of the first stage.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ckptbridge.kernels.arguments import check_tensor
from ckptbridge.kernels.backend import Backend, jit, num_multiprocessors, require_backend, tl

_CLIP_EPS = 1e-6
"""torch.nn.utils.clip_grad_norm_ adds it to the norm."""
_REFERENCE_ROW = 1024
"""On a CPU torch's norm of 1.3e8 fp32 numbers in one piece came out 1.4 % short; in rows of 1024 within 1e-9."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientNormConfig:
    """Launch knobs of the first stage. A program reads `block` elements at a time, several blocks under way."""

    block: int = 4096
    num_warps: int = 8
    num_stages: int = 3
    programs_per_multiprocessor: int = 4


def gradient_norm(
    gradients: Sequence[Tensor],
    squares: Sequence[Tensor] = (),
    *,
    backend: Backend = "reference",
    config: GradientNormConfig | None = None,
) -> Tensor:
    """The root of the sum of squares over all elements of all buffers, an fp32 scalar on their device.

    Each buffer: contiguous fp32 of any shape. `squares` are numbers, in tensors of any shape, that add up to the
    squares of elements that are in no buffer. Raises ValueError for an argument that does not fit and BackendError
    when `backend` cannot run on their device. The torch backend is the reference. `config` overrides the launch knobs
    of the triton backend.
    """
    if not gradients and not squares:
        raise ValueError("gradient_norm: gradients: expected one buffer at least, found none")
    some = [*gradients, *squares][0]
    for name, buffers in (("gradients", gradients), ("squares", squares)):
        for buffer in buffers:
            check_tensor("gradient_norm", name, buffer, like=some)
            if buffer.dtype != torch.float32:
                raise ValueError(f"gradient_norm: {name}: expected dtype torch.float32, found {buffer.dtype}")
    require_backend(backend, some.device)
    if backend == "triton":
        sums = _sums_of_squares_triton(gradients, some.device, config or GradientNormConfig())
        return torch.cat([sums, *(numbers.flatten() for numbers in squares)]).sum(dtype=torch.float64).sqrt().float()
    return gradient_norm_reference(gradients, squares)


def gradient_norm_reference(gradients: Sequence[Tensor], squares: Sequence[Tensor] = ()) -> Tensor:
    """The definition, rows first; fp64 buffers give an fp64 norm."""
    norms = [numbers.sum(dtype=torch.float64).sqrt().view(1) for numbers in squares]
    for gradient in gradients:
        whole = gradient.numel() // _REFERENCE_ROW * _REFERENCE_ROW
        flat = gradient.view(-1)
        norms.append(torch.linalg.vector_norm(flat[:whole].view(-1, _REFERENCE_ROW), dim=1))
        norms.append(torch.linalg.vector_norm(flat[whole:]).view(1))
    return torch.linalg.vector_norm(torch.cat(norms), dtype=torch.float64).to([*gradients, *squares][0].dtype)


def clip_coefficient(norm: Tensor, clip_grad: float) -> Tensor:
    """What gradients of that norm are multiplied by so that it is at most `clip_grad`: an fp32 scalar, at most 1."""
    return (clip_grad / (norm + _CLIP_EPS)).clamp(max=1.0)


def _sums_of_squares_triton(gradients: Sequence[Tensor], device: torch.device, config: GradientNormConfig) -> Tensor:
    most = config.programs_per_multiprocessor * num_multiprocessors(device)
    programs = [min(most, -(-gradient.numel() // config.block)) for gradient in gradients]
    sums_P = torch.empty(sum(programs), dtype=torch.float32, device=device)
    for gradient, sums in zip(gradients, sums_P.split(programs), strict=True):
        if P := sums.numel():
            _squares_kernel[(P,)](
                gradient,
                sums,
                gradient.numel(),
                BLOCK=config.block,
                NUM_STAGES=config.num_stages,
                num_warps=config.num_warps,
            )
    return sums_P


@jit
def _squares_kernel(gradient_ptr, sums_ptr, n, BLOCK: tl.constexpr, NUM_STAGES: tl.constexpr):
    program = tl.program_id(0)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for tile in tl.range(program, tl.cdiv(n, BLOCK), tl.num_programs(0), num_stages=NUM_STAGES):
        offsets = tl.cast(tile, tl.int64) * BLOCK + tl.arange(0, BLOCK)  # n passes 2**31 in real runs
        gradient = tl.load(gradient_ptr + offsets, mask=offsets < n, other=0.0)
        total += gradient * gradient
    tl.store(sums_ptr + program, tl.sum(total, 0))
