"""AdamW over flat buffers in one pass: clip, moments, decay, main weight, and the weight as its rounding.

    gradient *= coefficient
    exp_avg += (1 - beta1) (gradient - exp_avg)
    exp_avg_sq = beta2 exp_avg_sq + (1 - beta2) gradient^2
    main = (1 - lr weight_decay) main - lr / (1 - beta1^step) exp_avg / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps)
    weight = main, rounded to its dtype

as torch.optim.AdamW has it. The arithmetic is fp32, and main moves by the moments before they are rounded. Learning
rate, step number and coefficient are read on the device: a captured CUDA graph takes new ones at each replay.

Moments in bf16: exp_avg is rounded to nearest, which loses a move of less than 2^-8 of it. A move is 1 - beta1 of its
distance from the gradient, so at beta1 = 0.9 it stops within 4 % of a gradient that does not change. For exp_avg_sq
that would not do: at gradients of zero it falls by 1 - beta2 of itself, and from beta2 = 0.998 on it would never fall.
It is rounded up or down with the probability that makes the mean right (see kernels/stochastic_rounding.py).

Memory-bound. Floor with bf16 weights, in bytes an element: 4 gradient + 8 main + 16 moments + 2 weight = 30; with bf16
moments 22. fp32 weights are the main weights: 28.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ckptbridge.kernels.arguments import check_shape, check_tensor
from ckptbridge.kernels.backend import Backend, jit, require_backend, tl
from ckptbridge.kernels.stochastic_rounding import keys, rounded_at_random, stochastic_bf16

_REFERENCE_ELEMENTS = 1 << 26
"""What the reference works on at a time on a GPU: its five temporaries are 1.3 GB."""
_REFERENCE_ELEMENTS_CPU = 1 << 15
"""On a CPU they stay in the cache: 2.3 times as fast as whole buffers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamConfig:
    """Launch knobs. A program works on `block` consecutive elements."""

    # 4 elements a thread: all fp32 accesses are of 16 bytes, and 32 registers leave a multiprocessor its 2048 threads,
    # which have 128 KB under way (96 with bf16 moments). With 8 a thread the fp32 results cross shared memory before
    # they are written, five barriers a block.
    block: int = 1024
    num_warps: int = 8


@torch.no_grad()
def adam_step(
    gradient: Tensor,
    main: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight: Tensor | None = None,
    *,
    lr: Tensor,
    step: Tensor,
    coefficient: Tensor | None = None,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    first: int = 0,
    backend: Backend = "reference",
    config: AdamConfig | None = None,
) -> None:
    """Update main weights, moments and weights in place; the gradient is only read, but by the torch backend.

    gradient, main: fp32, exp_avg, exp_avg_sq: both fp32 or both bf16, weight: fp32 or bf16, or None where the main
    weight is the weight; all contiguous and of one shape. lr, step (1 at the first), coefficient (what the gradient
    is multiplied by): scalars on the same device. `first` is the position of the first element in the whole of which
    these buffers are a range: it decides how bf16 moments are rounded. `config` overrides the triton backend's knobs.
    The torch backend is torch's fused Adam, for fp32 moments; it leaves the gradient multiplied. Raises ValueError
    for an argument that does not fit and BackendError when `backend` cannot run on their device.
    """
    _check(gradient, main, exp_avg, exp_avg_sq, weight, {"lr": lr, "step": step, "coefficient": coefficient})
    require_backend(backend, main.device)
    if main.numel() == 0:
        return
    options: dict[str, Any] = {
        "lr": lr,
        "step": step,
        "coefficient": coefficient,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
    }
    if backend == "triton":
        _adam_triton(gradient, main, exp_avg, exp_avg_sq, weight, first=first, config=config or AdamConfig(), **options)
    elif backend == "torch":
        _adam_torch(gradient, main, exp_avg, exp_avg_sq, weight, **options)
    else:
        size = _REFERENCE_ELEMENTS_CPU if main.device.type == "cpu" else _REFERENCE_ELEMENTS
        for start in range(0, main.numel(), size):
            part = slice(start, start + size)
            adam_step_reference(
                gradient.view(-1)[part],
                main.view(-1)[part],
                exp_avg.view(-1)[part],
                exp_avg_sq.view(-1)[part],
                None if weight is None else weight.view(-1)[part],
                first=first + start,
                **options,
            )


def adam_step_reference(
    gradient: Tensor,
    main: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight: Tensor | None,
    *,
    lr: Tensor,
    step: Tensor,
    coefficient: Tensor | None,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    first: int = 0,
) -> None:
    """The definition, in place. Also takes fp64 (all but the weight), which then is fp64 throughout."""
    beta1, beta2 = betas
    step_size, inverse_root = _corrections(lr, step, betas)
    if coefficient is not None:
        gradient = gradient * coefficient
    mean = exp_avg.to(main.dtype).lerp(gradient, 1 - beta1)
    mean_square = exp_avg_sq.to(main.dtype).mul(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    move = mean / (mean_square.sqrt() * inverse_root + eps)
    main.mul_(1 - lr.double() * weight_decay).sub_(move.mul_(step_size))
    exp_avg.copy_(mean)
    exp_avg_sq.copy_(stochastic_bf16(mean_square, step, first) if exp_avg_sq.dtype == torch.bfloat16 else mean_square)
    if weight is not None:
        weight.copy_(main)


def _corrections(lr: Tensor, step: Tensor, betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """lr / (1 - beta1^step) and 1 / sqrt(1 - beta2^step) in fp64: 1 - 0.999 has only 14 bits left in fp32."""
    power1, power2 = (torch.pow(beta, step.double()) for beta in betas)
    return lr.double() / (1 - power1), (1 - power2).rsqrt()


def _adam_torch(
    gradient, main, exp_avg, exp_avg_sq, weight, *, lr, step, coefficient, betas, eps, weight_decay
) -> None:
    if exp_avg.dtype != torch.float32:
        raise ValueError(f"adam_step: exp_avg: the torch backend expects dtype torch.float32, found {exp_avg.dtype}")
    torch._fused_adamw_(
        [main],
        [gradient],
        [exp_avg],
        [exp_avg_sq],
        [],
        [step.float()],
        lr=lr if lr.device.type == "cpu" else lr.float(),
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        grad_scale=None if coefficient is None else coefficient.reciprocal(),
    )
    if weight is not None:
        weight.copy_(main)


def _adam_triton(
    gradient, main, exp_avg, exp_avg_sq, weight, *, lr, step, coefficient, betas, eps, weight_decay, first, config
) -> None:
    n = main.numel()
    rates = torch.stack((lr.double(), *_corrections(lr, step, betas))).float()
    _adam_kernel[(-(-n // config.block),)](
        gradient,
        main,
        exp_avg,
        exp_avg_sq,
        weight,
        rates,
        coefficient,
        keys(step) if exp_avg_sq.dtype == torch.bfloat16 else None,
        n,
        first,
        1 - betas[0],
        betas[1],
        1 - betas[1],
        eps,
        weight_decay,
        BLOCK=config.block,
        num_warps=config.num_warps,
    )


@jit
def _adam_kernel(
    gradient_ptr,
    main_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    weight_ptr,
    rates_ptr,
    coefficient_ptr,
    key_ptr,
    n,
    first,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    weight_decay,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # n passes 2**31 in real runs
    mask = offsets < n
    gradient = tl.load(gradient_ptr + offsets, mask=mask, other=0.0)
    main = tl.load(main_ptr + offsets, mask=mask, other=0.0)
    exp_avg = tl.load(exp_avg_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    lr = tl.load(rates_ptr)
    step_size = tl.load(rates_ptr + 1)
    inverse_root = tl.load(rates_ptr + 2)
    if coefficient_ptr is not None:
        gradient *= tl.load(coefficient_ptr).to(tl.float32)

    exp_avg += one_minus_beta1 * (gradient - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * gradient * gradient
    main = main * (1 - lr * weight_decay) - step_size * exp_avg / (tl.sqrt(exp_avg_sq) * inverse_root + eps)

    tl.store(main_ptr + offsets, main, mask=mask)
    if weight_ptr is not None:
        tl.store(weight_ptr + offsets, main.to(weight_ptr.dtype.element_ty), mask=mask)
    tl.store(exp_avg_ptr + offsets, exp_avg.to(exp_avg_ptr.dtype.element_ty), mask=mask)
    if key_ptr is not None:
        exp_avg_sq = rounded_at_random(exp_avg_sq, offsets + first, tl.load(key_ptr))
    tl.store(exp_avg_sq_ptr + offsets, exp_avg_sq.to(exp_avg_sq_ptr.dtype.element_ty), mask=mask)


def _check(
    gradient: Tensor,
    main: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight: Tensor | None,
    scalars: dict[str, Tensor | None],
) -> None:
    named = {"gradient": gradient, "main": main, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "weight": weight}
    for name, tensor in named.items():
        if tensor is None:
            continue
        check_tensor("adam_step", name, tensor, like=main)
        check_shape("adam_step", name, tensor, tuple(main.shape), "that of main")
    for name, tensor in (("gradient", gradient), ("main", main)):
        if tensor.dtype != torch.float32:
            raise ValueError(f"adam_step: {name}: expected dtype torch.float32, found {tensor.dtype}")
    if exp_avg.dtype != exp_avg_sq.dtype:
        raise ValueError(f"adam_step: exp_avg_sq: expected dtype {exp_avg.dtype} of exp_avg, found {exp_avg_sq.dtype}")
    for name, scalar in scalars.items():
        if scalar is None:
            continue
        if scalar.numel() != 1:
            raise ValueError(f"adam_step: {name}: expected a scalar tensor, found shape {tuple(scalar.shape)}")
        if scalar.device != main.device:
            raise ValueError(f"adam_step: {name}: expected device {main.device}, found {scalar.device}")
