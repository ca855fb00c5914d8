"""The oracle of swiglu: the output and the gradient against the reference in fp64, within derived bounds."""

# Shapes: R rows, F the width of a half of [gate_proj; up_proj].

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ckptbridge.kernels.swiglu import swiglu_reference
from tests.kernels.cases import SwigluCase, random_tensor
from tests.kernels.poison import poisoned_memory
from tests.kernels.tolerances import INSIDE, assert_close

Swiglu = Callable[[Tensor], Tensor]

ROWS_AT_ONCE = 4096  # of the fp64 reference: 1 GiB at F = 16384
EXTREMES = (0.0, -0.0, 1e-3, 20.0, -20.0, 100.0, -100.0)  # exp(100) is infinite in fp32, and the answer is finite


@dataclass(frozen=True, slots=True, kw_only=True)
class SwigluInputs:
    """The argument and the output gradient of one call."""

    x: Tensor
    d_out: Tensor


def swiglu_inputs(case: SwigluCase, device: torch.device, seed: int = 0) -> SwigluInputs:
    """Random inputs of a case, with extreme values of gate_proj in the first row."""
    generator = torch.Generator(device).manual_seed(seed)
    x = random_tensor((case.R, 2 * case.F), case.dtype, generator, scale=2.0, aligned=case.aligned)
    extremes = torch.tensor(EXTREMES[: case.F], dtype=case.dtype, device=device)
    x[:1, : len(extremes)] = extremes
    d_out = random_tensor((case.R, case.F), case.dtype, generator, aligned=case.aligned)
    return SwigluInputs(x=x.requires_grad_(), d_out=d_out)


@poisoned_memory()
def check_swiglu(operation: Swiglu, case: SwigluCase, device: torch.device, seed: int = 0) -> None:
    """Run `operation` forward and backward on a case; AssertionError names the first result that is off."""
    given = swiglu_inputs(case, device, seed)
    before = given.x.detach().clone()
    out = operation(given.x)
    (dx,) = torch.autograd.grad(out, given.x, given.d_out)
    assert torch.equal(given.x, before), "the input was written into"
    assert out.shape == given.d_out.shape, f"out: shape {tuple(out.shape)}, not {tuple(given.d_out.shape)}"
    assert out.dtype == dx.dtype == case.dtype, f"out: {out.dtype}, dx: {dx.dtype}, not {case.dtype}"
    for first in range(0, case.R, ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        _compare(given.x[rows].detach().double(), given.d_out[rows].double(), out[rows], dx[rows])


def _compare(x: Tensor, d_out: Tensor, out: Tensor, dx: Tensor) -> None:
    x.requires_grad_()
    expected_out = swiglu_reference(x)
    (expected_dx,) = torch.autograd.grad(expected_out, x, d_out)
    with torch.no_grad():
        # exp turns an error of its argument, relative in that, into one of |gate_proj| times as much.
        gate_proj, up_proj = x.chunk(2, -1)
        sensitivity = 1 + gate_proj.abs()
        # d_gate_proj = d_out up_proj sigmoid (1 + gate_proj (1 - sigmoid)), and the bracket can cancel.
        d_gate_terms = (d_out * up_proj * gate_proj.sigmoid()).abs() * sensitivity
        d_gate_noise, d_up_noise = (expected_dx.abs() * sensitivity.repeat(1, 2)).chunk(2, -1)
        dx_noise = torch.cat([d_gate_noise + d_gate_terms, d_up_noise], -1)
    assert_close("out", out, expected_out, roundings=1, noise=INSIDE * expected_out.abs() * sensitivity)
    assert_close("dx", dx, expected_dx, roundings=1, noise=INSIDE * dx_noise)
