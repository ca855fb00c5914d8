"""linear: torch's own forward, and gradients that go to main gradients, summed over micro-batches in fp32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ckptbridge.kernels import linear as linear_file
from ckptbridge.kernels.linear import linear
from ckptbridge.kernels.main_gradient import MainGradient, main_gradient_of, set_main_gradient
from tests.kernels.cases import BF16, FP32
from tests.kernels.poison import poisoned_memory
from tests.kernels.tolerances import INSIDE, REDUCTION, assert_close

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
# [..., T] x I -> O: one row, a leading dimension more, no row, sizes no multiple of anything.
SHAPES = [((1,), 8, 16), ((2, 5), 24, 40), ((0,), 8, 8), ((33,), 130, 7), ((3, 1), 1, 1), ((1, 129), 64, 1)]


def leaf(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, *, main: bool = False) -> Tensor:
    tensor = torch.randn(shape, generator=generator, device=generator.device).to(dtype).requires_grad_()
    if main:
        set_main_gradient(tensor, MainGradient(torch.empty(shape, device=generator.device)))
    return tensor


@poisoned_memory()
def check_linear(operation: Linear, rows: tuple[int, ...], inputs: int, outputs: int, dtype, device, *, bias=True):
    """Two micro-batches through one weight; AssertionError names the first result that is off."""
    generator = torch.Generator(device).manual_seed(5)
    weight = leaf((outputs, inputs), dtype, generator, main=True)
    offset = leaf((outputs,), dtype, generator, main=True) if bias else None
    wide_weight, wide_offset = (None if t is None else t.detach().double().requires_grad_() for t in (weight, offset))
    size_of_terms, d_sum_terms = torch.zeros_like(wide_weight), torch.zeros(outputs, device=device).double()
    for _ in range(2):
        x = leaf((*rows, inputs), dtype, generator)
        d_out = torch.randn((*rows, outputs), generator=generator, device=device).to(dtype)
        out = operation(x, weight, offset)
        out.backward(d_out)
        wide_x = x.detach().double().requires_grad_()
        wide_out = torch.nn.functional.linear(wide_x, wide_weight, wide_offset)
        wide_out.backward(d_out.double())
        with torch.no_grad():
            noise = INSIDE * REDUCTION * (wide_x.square() @ wide_weight.square().t()).sqrt()
            if wide_offset is not None:  # the product may be rounded before the bias is added
                noise = noise + torch.finfo(dtype).eps * wide_offset.abs()
            assert_close("out", out.detach(), wide_out, roundings=2, noise=noise)
            noise = INSIDE * REDUCTION * (d_out.double().square() @ wide_weight.square()).sqrt()
            assert_close("dx", x.grad, wide_x.grad, roundings=1, noise=noise)
            flat_x, flat_d = wide_x.reshape(-1, inputs), d_out.double().reshape(-1, outputs)
            size_of_terms += flat_d.square().t() @ flat_x.square()
            d_sum_terms += flat_d.square().sum(0)
    assert weight.grad is None, "autograd was given the weight's gradient"
    main = main_gradient_of(weight).finish()
    # fp32 whatever the dtype: nothing is rounded to bf16 on the way.
    assert_close("d_weight", main, wide_weight.grad, roundings=1, noise=INSIDE * REDUCTION * size_of_terms.sqrt())
    if offset is not None and wide_offset is not None:
        assert offset.grad is None, "autograd was given the bias's gradient"
        main = main_gradient_of(offset).finish()
        assert_close("d_bias", main, wide_offset.grad, roundings=1, noise=INSIDE * REDUCTION * d_sum_terms.sqrt())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients_equal_fp64(shape, dtype, bias, device):
    check_linear(linear, *shape, dtype, device, bias=bias)


def test_without_a_main_gradient_it_is_torchs_own(device):
    generator = torch.Generator(device).manual_seed(0)
    x, weight, bias = (leaf(shape, FP32, generator) for shape in ((5, 8), (6, 8), (6,)))
    gradients = torch.autograd.grad(linear(x, weight, bias).sum(), (x, weight, bias))
    expected = torch.autograd.grad(torch.nn.functional.linear(x, weight, bias).sum(), (x, weight, bias))
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def test_a_bias_without_a_main_gradient_keeps_autograds(device):
    generator = torch.Generator(device).manual_seed(0)
    x, weight, bias = (
        leaf((5, 8), FP32, generator),
        leaf((6, 8), FP32, generator, main=True),
        leaf((6,), FP32, generator),
    )
    linear(x, weight, bias).sum().backward()
    assert bias.grad.tolist() == [5.0] * 6


def test_no_gradient_where_none_is_wanted(device):
    generator = torch.Generator(device).manual_seed(0)
    x, weight = leaf((5, 8), FP32, generator), leaf((6, 8), FP32, generator, main=True)
    with torch.no_grad():
        assert not linear(x, weight).requires_grad
    linear(x, weight.requires_grad_(False)).sum().backward()
    assert not main_gradient_of(weight).is_filled
    weight.requires_grad_()
    linear(x.detach(), weight).sum().backward()  # an input without a gradient: the weight's is wanted all the same
    assert main_gradient_of(weight).is_filled


def test_under_recomputation_and_moved_activations(device):
    """Hooks on saved tensors hand back other tensors than were saved: the main gradient must not be lost with them."""
    generator = torch.Generator(device).manual_seed(0)
    x, weight = leaf((5, 8), FP32, generator), leaf((6, 8), FP32, generator, main=True)
    results = []
    for run in ("plain", "recomputed", "moved"):
        if run == "recomputed":
            out = torch.utils.checkpoint.checkpoint(linear, x, weight, use_reentrant=False)
        elif run == "moved":
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
                out = linear(x, weight)
        else:
            out = linear(x, weight)
        out.square().sum().backward()
        results.append(main_gradient_of(weight).finish().clone())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# Planted faults.


def _summed_in_the_weights_dtype(monkeypatch):
    def add_product(self, a, b):
        self.add(a.float().mm(b.float()).bfloat16())

    monkeypatch.setattr(MainGradient, "add_product", add_product)


def _overwritten_by_every_micro_batch(monkeypatch):
    def target(self):
        self.is_filled = True
        return self.tensor, False

    monkeypatch.setattr(MainGradient, "target", target)


def _never_overwritten(monkeypatch):
    monkeypatch.setattr(MainGradient, "target", lambda self: (self.tensor, True))


def _kept_by_autograd(monkeypatch):
    monkeypatch.setattr(linear_file, "main_gradient_of", lambda weight: None)


@pytest.mark.parametrize(
    ("plant", "caught_as"),
    [
        (_summed_in_the_weights_dtype, "d_weight"),
        (_overwritten_by_every_micro_batch, "d_weight"),
        (_never_overwritten, "d_weight"),
        (_kept_by_autograd, "autograd was given the weight's gradient"),
    ],
)
def test_oracle_catches(plant, caught_as, device, monkeypatch):
    check_linear(linear, (33,), 24, 40, BF16, device)
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=f"^{caught_as}"):
        check_linear(linear, (33,), 24, 40, BF16, device)
