"""MainGradient: the first contribution of a step overwrites, later ones add, and products stay in fp32."""

from __future__ import annotations

import pytest
import torch

from ckptbridge.kernels.main_gradient import MainGradient, main_gradient_of, set_main_gradient
from tests.kernels.cases import BF16, FP32


def poisoned(*shape: int, device: torch.device) -> MainGradient:
    return MainGradient(torch.full(shape, float("nan"), device=device))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_contributions_of_every_kind_add_up(dtype, device):
    generator = torch.Generator(device).manual_seed(0)
    main = poisoned(6, 10, device=device)
    a, b = (torch.randn(shape, generator=generator, device=device).to(dtype) for shape in ((6, 33), (33, 10)))
    gradient = torch.randn(6, 10, generator=generator, device=device).to(dtype)
    product = a.double() @ b.double()
    for _ in range(2):  # two steps: the second starts anew
        main.add_product(a, b)
        main.add(gradient)
        main.add_product(a, b)
        tensor, accumulate = main.target()
        assert accumulate
        tensor.add_(1)
        expected = 2 * product + gradient.double() + 1
        torch.testing.assert_close(main.finish().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_product_over_no_rows_is_zero(dtype, device):
    main = poisoned(6, 10, device=device)
    nothing = torch.empty(6, 0, dtype=dtype, device=device), torch.empty(0, 10, dtype=dtype, device=device)
    main.add_product(*nothing)
    assert not main.tensor.any()
    main.add(torch.ones(6, 10, device=device))
    main.add_product(*nothing)
    assert (main.finish() == 1).all()


def test_the_first_contribution_overwrites(device):
    main = poisoned(4, device=device)
    assert main.target() == (main.tensor, False)
    main.finish()
    main.add(torch.ones(4, device=device).bfloat16())
    assert (main.tensor == 1).all()
    assert main.is_filled


def test_without_a_contribution_the_sum_is_zero(device):
    main = poisoned(4, device=device)
    assert not main.finish().any()
    main.add(torch.ones(4, device=device))
    main.finish()
    assert not main.finish().any()


def test_squares_are_forgotten_with_what_they_are_of(device):
    main = poisoned(4, device=device)

    def fill():
        main.add(torch.ones(4, device=device))
        main.squares = torch.full((1,), 4.0, device=device)

    fill()
    main.finish()
    assert main.squares is not None
    main.finish()
    assert main.squares is None  # nothing came: the sum is zero
    fill()
    main.add(torch.ones(4, device=device))
    assert main.squares is None


def test_a_weight_carries_its_own(device):
    weight = torch.zeros(3, 2, device=device)
    assert main_gradient_of(weight) is None
    main = poisoned(3, 2, device=device)
    set_main_gradient(weight, main)
    assert main_gradient_of(weight) is main
    with pytest.raises(ValueError, match=r"expected shape \(2, 3\) of its weight, found \(3, 2\)"):
        set_main_gradient(weight.t(), main)
    with pytest.raises(ValueError, match=r"expected dtype torch.float32, found torch.bfloat16"):
        MainGradient(torch.zeros(3).bfloat16())
