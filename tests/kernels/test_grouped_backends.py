"""The grouped products of other packages: refused where they cannot run, and held against fp64 where they can."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch

from ckptbridge.kernels.backend import BackendError
from ckptbridge.kernels.experts import ProductsConfig, experts
from ckptbridge.kernels.grouped_backend import (
    MULTIPLES_OF_8,
    PRODUCTS_BACKENDS,
    WAITING,
    products_obstacle,
    require_products,
)
from ckptbridge.kernels.grouped_gemm import grouped_matmul, grouped_weight_gradient
from tests.kernels.cases_experts import REAL_EXPERTS, SMALL_EXPERTS
from tests.kernels.cases_grouped import MANY, REAL, SMALL, ragged_to_capture
from tests.kernels.oracle_experts import MAIN_GRADIENTS, check_experts
from tests.kernels.oracle_grouped import Captured, check_matmul, check_weight_gradient

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FOREIGN = ("quack", "transformer_engine")
HERE = [name for name in FOREIGN if products_obstacle(name, DEVICE) is None]
RAGGED = SMALL[2]
CASES = [*(case for case in SMALL if case.K % 8 == case.N % 8 == 0), MANY]
BOTH = (False, True)
MIXTURES = [SMALL_EXPERTS[0], SMALL_EXPERTS[4], SMALL_EXPERTS[6], SMALL_EXPERTS[8], REAL_EXPERTS[2]]


def foreign(**axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Every foreign product that runs here, with every combination of what else is named."""
    every = list(product(HERE, *axes.values()))
    return pytest.mark.parametrize(("name", *axes), every, ids=["-".join(map(str, one)) for one in every])


@foreign(case=[*CASES, *REAL[3:]], transposed=BOTH, gathered=BOTH)
def test_matmul_equals_fp64(name, case, transposed, gathered, device):
    check_matmul(partial(grouped_matmul, backend=name), case, device, transposed=transposed, gathered=gathered)


@foreign(case=[*CASES, *REAL[3:]], gathered=["nothing", "d", "x"], accumulate=BOTH)
def test_weight_gradient_equals_fp64(name, case, gathered, accumulate, device):
    keywords = {"accumulate": accumulate, "d_gathered": gathered == "d", "x_gathered": gathered == "x"}
    check_weight_gradient(partial(grouped_weight_gradient, backend=name), case, device, **keywords)


@foreign(case=CASES)
def test_gradient_in_bf16(name, case, device):
    check_weight_gradient(partial(grouped_weight_gradient, backend=name), case, device, dtype=torch.bfloat16)


@foreign(case=MIXTURES, main_gradient=MAIN_GRADIENTS)
def test_a_mixture_equals_fp64(name, case, main_gradient, device):
    config = ProductsConfig(matmul=name, weight_gradient=name)

    def run(x, weights, order, fc1, fc2, activation):
        return experts(x, weights, order, fc1, fc2, activation=activation, backend="triton", config=config)

    check_experts(run, case, device, main_gradient=main_gradient)


@foreign()
def test_a_matrix_that_is_trained_is_taken(name, device):
    """As autograd hands it over: a leaf that requires a gradient."""
    a = torch.randn(24, 16, device=device).bfloat16()
    weight = torch.nn.Parameter(torch.randn(2, 16, 16, device=device).bfloat16())
    ends_E = torch.tensor([8, 24], device=device, dtype=torch.int32)
    with torch.no_grad():
        for transposed in (False, True):
            out = grouped_matmul(a, weight, ends_E, transposed=transposed, backend=name)
            expected = grouped_matmul(a, weight, ends_E, transposed=transposed)
            torch.testing.assert_close(out, expected, rtol=2**-6, atol=2**-5)


@foreign()
def test_a_graph_follows_the_ends_unless_the_host_must_know_them(name, device):
    cases = ragged_to_capture(rows=100)
    captured = Captured(cases[0], device, backend=name)
    if name not in WAITING:
        captured.check(cases)
        return
    captured.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
            captured.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Planted faults, found in every foreign product as in the definition.


def _a_row_later(ends_E):
    ends_E = ends_E.clone()
    ends_E[2] -= 1
    return ends_E


@pytest.mark.parametrize("name", ["reference", *HERE])
def test_oracles_catch_a_row_of_the_next_expert(name, device):
    def matmul(a, weight, ends_E, **keywords):
        return grouped_matmul(a, weight, _a_row_later(ends_E), backend=name, **keywords)

    def gradient(d, x, ends_E, out, **keywords):
        grouped_weight_gradient(d, x, _a_row_later(ends_E), out, backend=name, **keywords)

    with pytest.raises(AssertionError, match="rows of expert 2"):
        check_matmul(matmul, RAGGED, device)
    for accumulate in (False, True):
        with pytest.raises(AssertionError, match="gradient of expert 2"):
            check_weight_gradient(gradient, RAGGED, device, accumulate=accumulate)


@pytest.mark.parametrize("name", ["reference", *HERE])
def test_oracle_catches_an_ignored_sum(name, device):
    def gradient(d, x, ends_E, out, *, accumulate, **keywords):
        grouped_weight_gradient(d, x, ends_E, out, accumulate=False, backend=name, **keywords)

    with pytest.raises(AssertionError, match="gradient of expert 0"):
        check_weight_gradient(gradient, RAGGED, device, accumulate=True)


# Refusals.


@pytest.mark.parametrize(("name", "why"), [("quack", "CUDA, not for cpu"), ("transformer_engine", "CUDA, not for cpu")])
def test_what_needs_a_gpu_is_refused_without_one(name, why):
    a, weight = torch.zeros(4, 8).bfloat16(), torch.zeros(2, 8, 8).bfloat16()
    ends_E, out = torch.tensor([1, 4], dtype=torch.int32), torch.zeros(2, 8, 8)
    match = rf"products {name} cannot run on cpu: .*{why}\. Available here: reference, torch"
    with pytest.raises(BackendError, match=match):
        grouped_matmul(a, weight, ends_E, transposed=True, backend=name)
    with pytest.raises(BackendError, match=match):
        grouped_weight_gradient(a, a, ends_E, out, accumulate=False, backend=name)


@pytest.mark.parametrize("name", [name for name in FOREIGN if name not in HERE] if DEVICE.type == "cuda" else [])
def test_what_is_not_installed_says_what_to_install(name, device):
    with pytest.raises(BackendError, match=r"pip install|does not load|Hopper"):
        require_products(name, device)


def test_a_name_that_does_not_exist():
    with pytest.raises(ValueError, match=rf"expected one of {', '.join(PRODUCTS_BACKENDS)}; found 'cutlass'"):
        require_products("cutlass", torch.device("cpu"))


@pytest.mark.parametrize("name", [name for name in MULTIPLES_OF_8 if products_obstacle(name, DEVICE) is None])
def test_widths_and_dtypes_that_are_not_taken(name, device):
    ends_E = torch.tensor([1, 4], dtype=torch.int32, device=device)
    a, weight = torch.zeros(4, 8, device=device).bfloat16(), torch.zeros(2, 12, 8, device=device).bfloat16()
    with pytest.raises(ValueError, match=f"{name}: expected widths of a multiple of 8, found 12 and 8"):
        grouped_matmul(a, weight, ends_E, transposed=True, backend=name)
    with pytest.raises(ValueError, match=f"{name}: expected torch.bfloat16, found torch.float32"):
        grouped_matmul(a.float(), weight.float(), ends_E, transposed=True, backend=name)


def test_nothing_foreign_is_imported_before_it_is_asked_for():
    program = (
        "import sys, ckptbridge.kernels.experts;"
        "print([name for name in ('quack', 'cutlass', 'transformer_engine') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# Who is chosen.


def test_a_name_is_followed_whatever_the_shapes():
    rows, fc2 = torch.zeros(3, 8).bfloat16(), torch.zeros(2, 8, 4)
    for name in PRODUCTS_BACKENDS:
        config = ProductsConfig.from_shape("reference", rows, fc2, products=name)
        assert (config.matmul, config.weight_gradient) == (name, name)
        assert config.gathers_forward == (name == "triton"), "others have no product that gathers"
    assert ProductsConfig.from_shape("triton", rows.float(), fc2).matmul == "reference"
    none = ProductsConfig.from_shape("reference", rows[:0], fc2, products="torch")
    assert none.matmul == "reference", "nothing is to be multiplied"
