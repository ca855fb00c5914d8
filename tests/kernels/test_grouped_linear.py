"""grouped_linear's biases: the rows that they are added to, and gradients that no row's rounding gets into."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ckptbridge.kernels.experts import ProductsConfig
from ckptbridge.kernels.main_gradient import MainGradient, set_main_gradient
from ckptbridge.trainer import grouped_linear as module
from ckptbridge.trainer.grouped_linear import grouped_linear
from tests.kernels.cases import BF16, FP32, random_tensor
from tests.kernels.poison import poisoned_memory
from tests.kernels.tolerances import FP32 as UNIT
from tests.kernels.tolerances import INSIDE, REDUCTION, assert_close

INPUTS, OUTPUTS = 16, 24
COUNTS = (3000, 0, 1, 77)
UNUSED = 5


@poisoned_memory()
def check_biases(products: str, dtype: torch.dtype, device: torch.device, *, main: bool = False) -> None:
    """AssertionError names what is off: the rows, or the gradient of the biases."""
    generator = torch.Generator(device).manual_seed(3)
    R = sum(COUNTS) + UNUSED
    ends_E = torch.tensor(COUNTS, device=device).cumsum(0).int()
    x, weight = (
        random_tensor((R, INPUTS), dtype, generator),
        torch.zeros(len(COUNTS), OUTPUTS, INPUTS, dtype=dtype).to(device),
    )
    bias = random_tensor((len(COUNTS), OUTPUTS), dtype, generator).requires_grad_()
    d_out = random_tensor((R, OUTPUTS), dtype, generator).add_(1)  # a mean, at which a sum in bf16 stops to grow
    d_out[R - UNUSED :] = torch.nan
    if main:
        set_main_gradient(bias, summed := MainGradient(torch.full(bias.shape, torch.nan, device=device)))
    out = grouped_linear(x, weight, ends_E, "reference", products, bias)
    experts_R = torch.arange(len(COUNTS), device=device).repeat_interleave(torch.tensor(COUNTS, device=device))
    assert torch.equal(out[: R - UNUSED], bias.detach()[experts_R]), "rows"
    out.backward(d_out)
    found: Tensor = summed.finish() if main else bias.grad
    expected = torch.zeros(bias.shape, dtype=torch.float64, device=device)
    squares = expected.clone().index_add_(0, experts_R, d_out[: R - UNUSED].double().square())
    expected.index_add_(0, experts_R, d_out[: R - UNUSED].double())
    noise = INSIDE * REDUCTION * squares.sqrt() + UNIT * expected.abs()
    # torch's product rounds once to bf16 before it is fp32.
    roundings = 1 if products != "torch" else 1 + round(2.0**-8 / UNIT) if found.dtype == FP32 else 2
    assert_close("bias", found, expected, roundings=roundings, noise=noise)


@pytest.mark.parametrize("main", [False, True])
@pytest.mark.parametrize(
    ("products", "dtype"), [("reference", FP32), ("reference", BF16), ("torch", BF16), ("triton", BF16)]
)
def test_gradient_of_biases_equals_fp64(products, dtype, main, device):
    check_biases(products, dtype, device, main=main)


def test_oracle_catches_sums_in_bf16(device, monkeypatch):
    class Autograds:
        """torch's own: what is read by index is summed in its own dtype."""

        @staticmethod
        def apply(bias_EO: Tensor, ends_E: Tensor, rows: int, config: ProductsConfig) -> Tensor:
            row = torch.arange(rows, dtype=ends_E.dtype, device=ends_E.device)
            return torch.nn.functional.pad(bias_EO, (0, 0, 0, 1))[torch.searchsorted(ends_E, row, right=True)]

    monkeypatch.setattr(module, "_Biases", Autograds)
    with pytest.raises(AssertionError, match="bias: "):
        check_biases("reference", BF16, device)
