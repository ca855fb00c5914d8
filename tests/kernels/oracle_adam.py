"""The oracle of adam_step: weights and moments against the definition in fp64, within derived bounds."""

# Shapes: n elements of a flat group.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ckptbridge.kernels.adam import adam_step_reference
from tests.kernels.cases import FP32, random_tensor
from tests.kernels.cases_adam import AdamCase
from tests.kernels.poison import poisoned_memory
from tests.kernels.tolerances import FP32 as FP32_ROUNDOFF
from tests.kernels.tolerances import INSIDE, assert_close

Adam = Callable[..., None]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamInputs:
    """The arguments of one call."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]
    options: dict[str, Any]


def adam_inputs(case: AdamCase, device: torch.device, seed: int = 0) -> AdamInputs:
    """Random inputs of a case; among them gradients and moments of zero, tiny and huge ones."""
    generator = torch.Generator(device).manual_seed(seed)

    def drawn(dtype: torch.dtype, scale: float) -> Tensor:
        return random_tensor((case.n,), dtype, generator, scale=scale, aligned=case.aligned)

    gradient, main = drawn(FP32, 0.1), drawn(FP32, 1.0)
    exp_avg, exp_avg_sq = drawn(case.moments, 0.05), drawn(case.moments, 0.1).square_()
    gradient[:5:2] = torch.tensor([0.0, 1e-12, 1e12], device=device)[: len(gradient[:5:2])]
    exp_avg_sq[:2], exp_avg[:2] = 0, 0
    weight = None if case.weight is None else drawn(case.weight, 1.0)
    options = {
        "lr": torch.tensor(case.lr, dtype=torch.float64, device=device),
        "step": torch.tensor(case.step, dtype=torch.float64, device=device),
        "coefficient": None if case.coefficient is None else torch.tensor(case.coefficient, device=device),
        "betas": case.betas,
        "eps": case.eps,
        "weight_decay": case.weight_decay,
        "first": case.first,
    }
    return AdamInputs(tensors=(gradient, main, exp_avg, exp_avg_sq, weight), options=options)


@poisoned_memory()
def check_adam(
    operation: Adam, case: AdamCase, device: torch.device, seed: int = 0, *, is_torchs: bool = False
) -> None:
    """Run `operation` on a case; AssertionError names the first result that is off.

    torch's own may write into the gradient, and on a GPU computes 1 - beta2 in fp32.
    """
    given = adam_inputs(case, device, seed)
    gradient, main, exp_avg, exp_avg_sq, weight = given.tensors
    before = [None if tensor is None else tensor.clone() for tensor in given.tensors]
    wide = [tensor.double() for tensor in given.tensors[:4] if tensor is not None]
    adam_step_reference(*wide, None, **given.options)
    operation(*given.tensors, **given.options)
    if not is_torchs:
        assert torch.equal(gradient, before[0]), "the gradient was written into"
    _check_surroundings(given.tensors)
    of_beta2 = FP32_ROUNDOFF / (1 - case.betas[1]) if is_torchs and device.type == "cuda" else 0.0
    _compare(case, before, wide, main, exp_avg, exp_avg_sq, weight, of_beta2)


def _check_surroundings(tensors: tuple[Tensor | None, ...]) -> None:
    for tensor in tensors:
        if tensor is not None and tensor._base is not None:
            assert int(tensor._base.isnan().sum()) >= tensor._base.numel() - tensor.numel(), "written out of bounds"


def _compare(case, before, expected, main, exp_avg, exp_avg_sq, weight, of_beta2) -> None:
    old_gradient, old_main, old_exp_avg, *_ = (None if tensor is None else tensor.double() for tensor in before)
    _, expected_main, expected_exp_avg, expected_exp_avg_sq = expected
    coefficient = 1.0 if case.coefficient is None else case.coefficient
    exp_avg_noise = INSIDE * (old_exp_avg.abs() + (old_gradient * coefficient).abs())
    assert_close("exp_avg", exp_avg, expected_exp_avg, roundings=1, noise=exp_avg_noise)
    # Up or down at random is off by a whole spacing of bf16; unit_roundoff already says so of the interpreter.
    whole = 2 if case.moments != FP32 and main.is_cuda else 1
    noise = (INSIDE + of_beta2) * expected_exp_avg_sq
    assert_close("exp_avg_sq", exp_avg_sq, expected_exp_avg_sq, roundings=whole, noise=noise)

    correction1, correction2 = (1 - beta**case.step for beta in case.betas)
    rate = case.lr / correction1 / ((expected_exp_avg_sq / correction2).sqrt() + case.eps)
    main_noise = INSIDE * old_main.abs() + (INSIDE + of_beta2) * rate * expected_exp_avg.abs() + rate * exp_avg_noise
    assert_close("main", main, expected_main, roundings=1, noise=main_noise)
    if weight is not None:
        assert_close("weight", weight, expected_main, roundings=1, noise=main_noise)
