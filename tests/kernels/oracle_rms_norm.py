"""The oracle of rms_norm: outputs and all gradients against the reference in fp64, within derived bounds."""

# Shapes: R rows, H hidden_size.

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ckptbridge.kernels.rms_norm import rms_norm_reference
from tests.kernels.cases import RmsNormCase, random_tensor
from tests.kernels.poison import poisoned_memory
from tests.kernels.tolerances import FP32, INSIDE, REDUCTION, assert_close, unit_roundoff

RmsNorm = Callable[[Tensor, Tensor, float, Tensor | None], Tensor | tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RmsNormInputs:
    """Arguments and output gradients of one call."""

    x: Tensor
    weight: Tensor
    residual: Tensor | None
    d_normed: Tensor
    d_summed: Tensor | None

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.weight] + ([] if self.residual is None else [self.residual])

    @property
    def output_gradients(self) -> list[Tensor]:
        return [self.d_normed] + ([] if self.d_summed is None else [self.d_summed])


def rms_norm_inputs(case: RmsNormCase, device: torch.device, seed: int = 0) -> RmsNormInputs:
    """Random inputs of a case; the weight is spread around one as a trained one is."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(scale: float = 1.0) -> Tensor:
        return random_tensor((case.R, case.H), case.dtype, generator, scale=scale, aligned=case.aligned)

    weight = random_tensor((case.H,), case.weight_dtype, generator, scale=0.5, aligned=case.aligned)
    return RmsNormInputs(
        x=draw(case.scale).requires_grad_(),
        weight=weight.add_(1).requires_grad_(),
        residual=draw(case.scale).requires_grad_() if case.has_residual else None,
        d_normed=draw(),
        d_summed=draw() if case.has_residual else None,
    )


@poisoned_memory()
def check_rms_norm(
    operation: RmsNorm, case: RmsNormCase, device: torch.device, *, fused: bool = True, seed: int = 0
) -> None:
    """Run `operation` forward and backward on a case; AssertionError names the first result that is off.

    A fused backward pass is in fp32 up to its results; plain autograd (`fused=False`) rounds what lies between.
    """
    given = rms_norm_inputs(case, device, seed)
    before = [leaf.detach().clone() for leaf in given.leaves]
    actual = _run(operation, given, case.eps)
    for leaf, copy in zip(given.leaves, before, strict=True):
        assert torch.equal(leaf, copy), "an input was written into"

    wide = _in_fp64(given)
    expected = _run(rms_norm_reference, wide, case.eps)
    assert actual.keys() == expected.keys()
    for name, (roundings, noise) in _bounds(case, wide, fused).items():
        dtype = case.weight_dtype if name == "dweight" else case.dtype
        assert actual[name].dtype == dtype, f"{name}: {actual[name].dtype}, not {dtype}"
        assert_close(name, actual[name], expected[name], roundings=roundings, noise=noise)


def _run(operation: RmsNorm, given: RmsNormInputs, eps: float) -> dict[str, Tensor]:
    outputs = operation(given.x, given.weight, eps, given.residual)
    outputs = [outputs] if given.residual is None else list(outputs)
    # An output cut from its inputs shall show as a wrong gradient, not as an error inside autograd.
    followed = [
        (output, gradient)
        for output, gradient in zip(outputs, given.output_gradients, strict=True)
        if output.requires_grad
    ]
    gradients = torch.autograd.grad(
        [output for output, _ in followed],
        given.leaves,
        [gradient for _, gradient in followed],
        materialize_grads=True,
    )
    names = ["normed", "summed"][: len(outputs)] + ["dx", "dweight", "dresidual"][: len(gradients)]
    return dict(zip(names, [*outputs, *gradients], strict=True))


def _in_fp64(given: RmsNormInputs) -> RmsNormInputs:
    return RmsNormInputs(
        x=given.x.detach().double().requires_grad_(),
        weight=given.weight.detach().double().requires_grad_(),
        residual=None if given.residual is None else given.residual.detach().double().requires_grad_(),
        d_normed=given.d_normed.double(),
        d_summed=None if given.d_summed is None else given.d_summed.double(),
    )


@torch.no_grad()
def _bounds(case: RmsNormCase, given: RmsNormInputs, fused: bool) -> dict[str, tuple[int, Tensor | float]]:
    """(roundings, noise) of each result. `given` is in fp64."""
    u = unit_roundoff(case.dtype, given.x.device)
    inside = INSIDE + FP32 * math.sqrt(case.H)  # with the sums over a row
    # The rounded sum moves a normalised element by u through itself and by at most u through the rms.
    of_sum = 2 if case.has_residual else 0
    of_autograd = 0 if fused else 1

    summed = given.x if given.residual is None else given.x + given.residual
    inverse_rms = torch.rsqrt(summed.square().mean(-1, keepdim=True) + case.eps)
    normed = summed * inverse_rms
    d_rows = given.d_normed * given.weight
    dx_terms = inverse_rms * (d_rows.abs() + normed.abs() * (d_rows * normed).abs().mean(-1, keepdim=True))
    dweight_terms = (given.d_normed * normed).square().sum(0).sqrt()  # sqrt(R) of a term

    # In dx the normalised row stands twice, 1/rms once, and d_rows twice.
    dx = (1 + of_autograd, (inside + (2 * of_sum + of_sum / 2 + 2 * of_autograd) * u) * dx_terms)
    return {
        # Rounded as a normalised row and again after the weight.
        "normed": (2 + of_sum, inside * (normed * given.weight).abs()),
        "dx": dx,
        # Each term holds a rounded normalised element; the sum itself is in fp32.
        "dweight": (
            1,
            (REDUCTION * (1 + of_sum + of_autograd) * u + inside + FP32 * math.sqrt(case.R)) * dweight_terms,
        ),
    } | ({"summed": (1, 0.0), "dresidual": dx} if case.has_residual else {})
