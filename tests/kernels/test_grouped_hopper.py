"""The grouped products whose warps have roles, on a Hopper GPU: against fp64, as the other kernels."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ckptbridge.kernels.grouped_config import GroupedConfig
from ckptbridge.kernels.grouped_gemm import grouped_matmul, grouped_weight_gradient
from ckptbridge.kernels.grouped_tiles import hopper_kernels
from tests.kernels.cases_grouped import MANY, SMALL, ragged_to_capture
from tests.kernels.oracle_grouped import Captured, check_matmul, check_weight_gradient

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
CASES = [SMALL[0], SMALL[2], SMALL[3], MANY]
KNOBS = {
    "narrow": GroupedConfig(block_rows=128, block_columns=64, num_stages=3, group=2, engine="gluon"),
    "wide": GroupedConfig(block_rows=128, block_columns=256, num_stages=4, parts=2, engine="gluon"),
    "wide, one half ahead": GroupedConfig(
        block_rows=128, block_columns=256, num_stages=4, parts=2, lead=2, engine="gluon"
    ),
    "high": GroupedConfig(block_rows=256, block_columns=128, num_stages=3, parts=2, lead=1, engine="gluon"),
}
on_hopper = pytest.mark.parametrize("knobs", KNOBS.values() if ON_HOPPER else [], ids=KNOBS.keys() if ON_HOPPER else [])


@on_hopper
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matmul_equals_fp64(case, transposed, knobs, device):
    assert hopper_kernels(knobs, torch.empty(1, case.K, device=device).bfloat16()), "the Triton kernels would run"
    check_matmul(partial(grouped_matmul, backend="triton", config=knobs), case, device, transposed=transposed)


@on_hopper
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_weight_gradient_equals_fp64(case, accumulate, knobs, device):
    for sums_squares in (False, True):
        operation = partial(grouped_weight_gradient, sums_squares=sums_squares, backend="triton", config=knobs)
        check_weight_gradient(operation, case, device, accumulate=accumulate)


@on_hopper
def test_gradient_in_bf16(knobs, device):
    operation = partial(grouped_weight_gradient, backend="triton", config=knobs)
    check_weight_gradient(operation, MANY, device, dtype=torch.bfloat16)


@on_hopper
def test_same_numbers_in_every_run(knobs, device):
    generator = torch.Generator(device).manual_seed(0)
    d, x = (torch.randn(3000, 640, device=device, generator=generator).bfloat16() for _ in range(2))
    weight = torch.randn(3, 640, 640, device=device, generator=generator).bfloat16()
    ends_E = torch.tensor([90, 90, 2900], device=device, dtype=torch.int32)
    gradients = torch.zeros(5, 3, 640, 640, device=device)
    products = []
    for gradient in gradients:
        for _ in range(3):
            grouped_weight_gradient(d, x, ends_E, gradient, accumulate=True, backend="triton", config=knobs)
        products.append(grouped_matmul(x, weight, ends_E, transposed=True, backend="triton", config=knobs)[:2900])
    for gradient, product in zip(gradients, products, strict=True):
        assert torch.equal(gradient, gradients[0])
        assert torch.equal(product, products[0])


@on_hopper
def test_captured_in_a_graph_it_follows_the_ends(knobs, device):
    cases = ragged_to_capture(rows=1000)
    Captured(cases[0], device, backend="triton", config=knobs).check(cases)
