"""gradient_norm and clip_coefficient: against fp64 and torch's own clipping, on buffers of awkward sizes."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ckptbridge.kernels.gradient_norm import clip_coefficient, gradient_norm, gradient_norm_reference
from tests.kernels.cases import FP32, random_tensor
from tests.kernels.poison import poisoned_memory
from tests.kernels.tolerances import INSIDE

# No multiple of a row (1024) or block (4096), nothing at all, more blocks than programs of the first stage.
SIZES = [(1,), (5, 0, 3), (1023,), (1024, 1025), (4096,), (4097, 2), (70_001,), (128, 40_000, 1)]


@poisoned_memory()
def check_gradient_norm(operation, sizes, device, scale=1.0, seed=0, known=0):
    """Of the last `known` buffers the operation gets squares, in rows of three where they can be cut so."""
    generator = torch.Generator(device).manual_seed(seed)
    gradients = [random_tensor((size,), FP32, generator, scale=scale) for size in sizes]
    before = [gradient.clone() for gradient in gradients]
    squares = [_squares(gradient) for gradient in gradients[len(gradients) - known :]]
    norm = operation(gradients[: len(gradients) - known], *([squares] if known else []))
    expected = torch.cat(gradients).double().norm()
    assert norm.dtype == FP32
    assert norm.shape == ()
    assert norm.device == gradients[0].device
    assert all(torch.equal(a, b) for a, b in zip(gradients, before, strict=True)), "a gradient was written into"
    # All terms are positive: the sum is as good as its terms, whose root halves the error.
    assert abs(norm.double() - expected) <= INSIDE * expected, f"norm: {norm.item()}, expected {expected.item()}"


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_norm_equals_fp64(sizes, backend, device):
    check_gradient_norm(partial(gradient_norm, backend=backend), sizes, device)


def _squares(gradient):
    squares = gradient.square()
    return squares.view(-1, 3) if len(squares) % 3 == 0 else squares


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("known", [1, 3])
def test_of_some_buffers_the_squares_are_known(known, backend, device):
    check_gradient_norm(partial(gradient_norm, backend=backend), (4097, 30, 300), device, known=known)


def _squares_left_out(gradients, squares=()):
    return gradient_norm(gradients)


def _squares_taken_for_gradients(gradients, squares=()):
    return gradient_norm([*gradients, *squares])


@pytest.mark.parametrize("fault", [_squares_left_out, _squares_taken_for_gradients])
def test_oracle_catches_wrong_use_of_squares(fault, device):
    check_gradient_norm(gradient_norm, (50, 30), device, known=1)
    with pytest.raises(AssertionError, match="norm"):
        check_gradient_norm(fault, (50, 30), device, known=1)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_small_and_large_gradients(scale, backend, device):
    check_gradient_norm(partial(gradient_norm, backend=backend), (5000,), device, scale=scale)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_many_terms_do_not_lose_the_small_ones(backend, device):
    """An fp32 sum of so many equal squares, one after the other, is 3e-4 short. Of 128 it may be 128 roundings off."""
    gradient = torch.full((1 << 22,), 0.1, device=device)
    assert gradient_norm([gradient], backend=backend).item() == pytest.approx(0.1 * 2**11, rel=128 * 2.0**-24 / 2)


def test_no_gradient_and_those_that_are_no_numbers(device):
    for backend in ("reference", "triton"):
        assert gradient_norm([torch.zeros(300, device=device)], backend=backend) == 0
        broken = torch.zeros(300, device=device)
        broken[7] = float("nan")
        assert gradient_norm([broken], backend=backend).isnan()
        broken[7] = float("inf")
        assert gradient_norm([broken], backend=backend).isinf()


def test_the_same_bits_at_every_call(device):
    gradient = torch.randn(100_000, generator=torch.Generator(device).manual_seed(3), device=device)
    norms = {gradient_norm([gradient], backend="triton").item() for _ in range(5)}
    assert len(norms) == 1


@pytest.mark.parametrize("factor", [0.1, 1.0, 30.0])
def test_coefficient_is_that_of_torch(factor):
    parameters = [torch.nn.Parameter(torch.zeros(30)), torch.nn.Parameter(torch.zeros(7, 5))]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape) * factor
    gradients = [parameter.grad.clone() for parameter in parameters]
    norm = gradient_norm(gradients)
    coefficient = clip_coefficient(norm, 2.0)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(parameters, 2.0))
    for gradient, parameter in zip(gradients, parameters, strict=True):
        torch.testing.assert_close(gradient * coefficient, parameter.grad)


def _mean_square(gradients):
    return gradient_norm(gradients) / sum(gradient.numel() for gradient in gradients) ** 0.5


def _last_buffer_left_out(gradients):
    return gradient_norm(gradients[:-1])


def _sum_of_norms(gradients):
    return torch.stack([gradient_norm([gradient]) for gradient in gradients]).sum()


def _last_element_left_out(gradients):
    return gradient_norm([gradient[:-1] for gradient in gradients])


def _largest(gradients):
    return torch.cat(gradients).abs().max()


def _in_bf16(gradients):
    return gradient_norm_reference([gradient.bfloat16().float() for gradient in gradients])


@pytest.mark.parametrize(
    "fault", [_mean_square, _last_buffer_left_out, _sum_of_norms, _last_element_left_out, _largest, _in_bf16]
)
def test_oracle_catches(fault, device):
    check_gradient_norm(gradient_norm, (50, 30), device)
    with pytest.raises(AssertionError, match="norm"):
        check_gradient_norm(fault, (50, 30), device)


def test_arguments_that_do_not_fit():
    def refused(match, gradients, **keywords):
        with pytest.raises(ValueError, match=match):
            gradient_norm(gradients, **keywords)

    refused("expected one buffer at least", [])
    refused(r"expected dtype torch.float32, found torch.bfloat16", [torch.zeros(3).bfloat16()])
    refused(r"squares: expected dtype torch.float32, found torch.bfloat16", [], squares=[torch.zeros(3).bfloat16()])
    refused(r"expected a contiguous tensor", [torch.zeros(4, 4).t()])
    refused(r"backend: expected one of reference", [torch.zeros(3)], backend="cuda")
