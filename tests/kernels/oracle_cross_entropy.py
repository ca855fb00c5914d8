"""The oracles of linear_cross_entropy and of its kernel: fp64, within derived bounds."""

# Shapes: T tokens, C tokens of a chunk, H hidden_size, V vocab_size.

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ckptbridge.kernels.cross_entropy import linear_cross_entropy_reference, token_losses_reference
from ckptbridge.kernels.main_gradient import MainGradient, set_main_gradient
from tests.kernels.cases import random_tensor
from tests.kernels.cases_cross_entropy import CrossEntropyCase, TokenLossCase
from tests.kernels.poison import poisoned_memory
from tests.kernels.tolerances import FP32, INSIDE, REDUCTION, assert_close, unit_roundoff

TokenLosses = Callable[[Tensor, Tensor, float | None], Tensor]
"""Takes logits (and writes their gradient over them), targets and a divisor; returns losses."""
CrossEntropy = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def token_loss_inputs(case: TokenLossCase, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and targets; the first two targets are the likeliest and the least likely word."""
    generator = torch.Generator(device).manual_seed(seed)
    rows = random_tensor((case.C, case.V + case.gap), case.dtype, generator, scale=case.scale)
    logits = rows[:, : case.V]
    rows[:, case.V :] = float("nan")
    targets = torch.randint(case.V, (case.C,), generator=generator, device=device)
    if case.C > 1:
        targets[0], targets[1] = logits[0].argmax(), logits[1].argmin()
    return logits, targets


@poisoned_memory()
def check_token_losses(operation: TokenLosses, case: TokenLossCase, device: torch.device, *, seed: int = 0) -> None:
    """Run `operation` on a case; AssertionError names the first result that is off."""
    logits, targets = token_loss_inputs(case, device, seed)
    wide = logits.double()
    losses = operation(logits, targets, case.divisor)
    assert losses.dtype == torch.float32, f"losses: {losses.dtype}"
    expected, d_logits = token_losses_reference(wide, targets, case.divisor)
    noise, d_noise = _token_noise(wide, targets, 0.0)
    assert_close("losses", losses, expected, roundings=1, noise=noise)
    if d_logits is None:
        assert torch.equal(logits.double(), wide), "logits were written over, and no gradient was wanted"
    elif case.divisor is not None:
        assert_close("d_logits", logits, d_logits, roundings=1, noise=d_noise / case.divisor)


def _token_noise(logits_CV: Tensor, targets_C: Tensor, error_CV: Tensor | float) -> tuple[Tensor, Tensor]:
    """Of losses [C], and of their gradient [C, V], when logits (fp64) are off by `error_CV` before fp32's own."""
    largest = logits_CV.amax(1, keepdim=True)
    p = logits_CV.softmax(1)
    log_total = logits_CV.logsumexp(1, keepdim=True)
    # exp turns an error of its argument, relative in that, into one of |argument| times as much.
    inside_CV = INSIDE * (1 + (logits_CV - largest).abs() + logits_CV.abs())
    of_total = (p * (inside_CV + error_CV)).sum(1, keepdim=True)
    of_total += FP32 * math.sqrt(logits_CV.shape[1]) + INSIDE * log_total.abs()
    of_logits = inside_CV + error_CV
    losses = (of_total + of_logits.gather(1, targets_C[:, None])).squeeze(1)
    d_logits = p * (of_total + of_logits) + INSIDE * p
    d_logits.scatter_add_(1, targets_C[:, None], torch.full_like(of_total, INSIDE))
    return losses, d_logits


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEntropyInputs:
    """Arguments of one call."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    divisor: float


def cross_entropy_inputs(case: CrossEntropyCase, device: torch.device, seed: int = 0) -> CrossEntropyInputs:
    """Random inputs of a case, whose logits are of size 2."""
    generator = torch.Generator(device).manual_seed(seed)
    return CrossEntropyInputs(
        hidden=random_tensor((case.T, case.H), case.dtype, generator).requires_grad_(),
        weight=random_tensor((case.V, case.H), case.dtype, generator, scale=2 / math.sqrt(case.H)).requires_grad_(),
        targets=torch.randint(case.V, (case.T,), generator=generator, device=device),
        divisor=float(case.T or 1),
    )


@poisoned_memory()
def check_cross_entropy(
    operation: CrossEntropy,
    case: CrossEntropyCase,
    device: torch.device,
    *,
    main: bool = False,
    gradient: float = 1.0,
    seed: int = 0,
) -> None:
    """Run `operation` forward and backward; AssertionError names the first result that is off.

    With `main` the weight has a main gradient, which held something before. `gradient` is that of the loss.
    """
    given = cross_entropy_inputs(case, device, seed)
    before = torch.zeros(case.V, case.H, device=device)
    if main:
        set_main_gradient(given.weight, summed := MainGradient(torch.full_like(before, float("nan"))))
        before.fill_(1 / 512)
        summed.add(before)
    loss = operation(given.hidden, given.weight, given.targets, given.divisor)
    d_loss = torch.tensor(gradient, device=device)
    loss.backward(d_loss) if gradient != 1 else loss.backward()
    assert loss.dtype == torch.float32, f"loss: {loss.dtype}"
    if main:
        assert given.weight.grad is None, "the weight has a gradient beside its main gradient"
        d_weight = summed.finish()
    else:
        d_weight = given.weight.grad

    leaves = [t.detach().double().requires_grad_() for t in (given.hidden, given.weight)]
    expected = linear_cross_entropy_reference(*leaves, given.targets, given.divisor)
    d_hidden, d_expected = torch.autograd.grad(expected, leaves, torch.tensor(gradient, dtype=torch.float64).to(device))
    loss_noise, hidden_noise, weight_noise = _noise(given, *(leaf.detach() for leaf in leaves))
    factor = abs(gradient)
    assert_close("loss", loss.detach(), expected, roundings=1, noise=loss_noise)
    assert_close("dhidden", given.hidden.grad, d_hidden, roundings=2 + (gradient != 1), noise=factor * hidden_noise)
    # The gradient of the logits is rounded; an interpreted kernel cuts it off, which no sum evens out.
    u = unit_roundoff(case.dtype, device)
    weight_noise = factor * weight_noise + u * d_expected.abs() + 4 * FP32 * before.double()
    assert_close("dweight", d_weight, d_expected + before, roundings=1, noise=weight_noise)


@torch.no_grad()
def _noise(given: CrossEntropyInputs, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the loss, of the gradients of hidden and weight."""
    u = unit_roundoff(given.hidden.dtype, given.hidden.device)
    T, H = hidden.shape
    logits = hidden @ weight.t()
    terms = (hidden.square() @ weight.square().t()).sqrt()  # sqrt(H) of a term
    error = u * logits.abs() + (FP32 * math.sqrt(H) + INSIDE) * terms
    losses, d_logits = _token_noise(logits, given.targets, error)
    p = logits.softmax(1)
    d_expected = p.scatter_add(1, given.targets[:, None], -torch.ones(T, 1, dtype=p.dtype, device=p.device))
    size = d_expected.abs()
    d_noise = (d_logits + (u + FP32 * (math.sqrt(len(weight)) + math.sqrt(T)) + INSIDE) * size) / given.divisor
    # What moves the logarithm of the total moves all of a row together.
    common = (p * error).sum(1, keepdim=True) / given.divisor
    of_hidden = REDUCTION * (d_noise.square() @ weight.square()).sqrt() + common * (p @ weight).abs()
    of_weight = REDUCTION * (d_noise.square().t() @ hidden.square()).sqrt()
    of_loss = losses.square().sum().sqrt() * REDUCTION + FP32 * math.sqrt(T) * losses.numel()
    return of_loss / given.divisor, of_hidden, of_weight
