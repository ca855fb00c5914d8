"""gather_rows and sum_rows: against fp64, and an oracle that sees planted faults."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from ckptbridge.kernels.gather import RowsConfig, gather_rows, gather_rows_reference, sum_rows, sum_rows_reference
from ckptbridge.kernels.order import Order
from tests.kernels.cases import BF16, FP32, random_tensor
from tests.kernels.cases_experts import REAL_EXPERTS, SMALL_EXPERTS, ExpertsCase, order_of, random_choices
from tests.kernels.poison import poisoned_memory
from tests.kernels.tolerances import FP32 as FP32_ROUNDOFF
from tests.kernels.tolerances import INSIDE, assert_close

CASES = SMALL_EXPERTS + (REAL_EXPERTS if torch.cuda.is_available() else [])


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsInputs:
    """Tokens, sorted rows of which the unused ones are NaN, and weights."""

    x: Tensor
    y: Tensor
    weights: Tensor
    order: Order


def rows_inputs(case: ExpertsCase, device: torch.device, seed: int = 0) -> RowsInputs:
    host = torch.Generator().manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    order = order_of(case, random_choices(case, host), device)
    y = random_tensor((len(order.tokens_R), case.H), case.dtype, generator, aligned=case.aligned)
    y[order.ends_E[-1] :] = math.nan
    return RowsInputs(
        x=random_tensor((case.T, case.H), case.dtype, generator, aligned=case.aligned).requires_grad_(),
        y=y.requires_grad_(),
        weights=random_tensor((case.T, case.K), FP32, generator, aligned=case.aligned).requires_grad_(),
        order=order,
    )


def summed_noise(y: Tensor, rows_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """Of the sum of each token's rows, in fp64."""
    terms = sum_rows_reference(y.abs(), rows_TK, None if weights_TK is None else weights_TK.abs())
    return (INSIDE + FP32_ROUNDOFF * rows_TK.shape[1]) * terms


@poisoned_memory()
def check_gather_rows(operation: Callable, case: ExpertsCase, device: torch.device) -> None:
    """Every used row is a token's bit for bit, or zero; the gradient is the sum of a token's rows."""
    given = rows_inputs(case, device)
    used, order = slice(0, int(given.order.ends_E[-1])), given.order
    out = operation(given.x, order)
    (dx,) = torch.autograd.grad(out, given.x, given.y.detach())
    expected = gather_rows_reference(given.x, order.tokens_R)[used]
    assert out.dtype == dx.dtype == case.dtype
    assert torch.equal(out[used], expected), "out: a row is not its token's"
    wide = given.y.detach().double()
    with torch.no_grad():
        expected_dx = sum_rows_reference(wide, order.rows_TK, None)
        assert_close("dx", dx, expected_dx, roundings=1, noise=summed_noise(wide, order.rows_TK, None))


@poisoned_memory()
def check_sum_rows(operation: Callable, case: ExpertsCase, device: torch.device, *, weighted: bool = True) -> None:
    """The sum, and the gradients of the used rows and of the weights."""
    given = rows_inputs(case, device)
    used, order = slice(0, int(given.order.ends_E[-1])), given.order
    leaves = [given.y, given.weights] if weighted else [given.y]
    d_out = given.x.detach()
    out = operation(given.y, order, given.weights if weighted else None)
    d_y, *d_weights = torch.autograd.grad(out, leaves, d_out)
    assert out.dtype == d_y.dtype == case.dtype

    y, weights = given.y.detach().double().requires_grad_(), given.weights.detach().double().requires_grad_()
    wide = sum_rows_reference(y, order.rows_TK, weights if weighted else None)
    expected = torch.autograd.grad(wide, [y, weights] if weighted else [y], d_out.double())
    with torch.no_grad():
        noise = summed_noise(y, order.rows_TK, weights if weighted else None)
        assert_close("out", out, wide, roundings=1, noise=noise)
        assert_close("dy", d_y[used], expected[0][used], roundings=1, noise=INSIDE * expected[0][used].abs())
        if weighted:
            terms = y[order.rows_TK.clamp(min=0)].square() * d_out.double().square().unsqueeze(1)
            terms = terms.masked_fill((order.rows_TK < 0).unsqueeze(-1), 0).sum(-1).sqrt()
            inside = INSIDE + FP32_ROUNDOFF * math.sqrt(case.H)
            assert_close("dweights", d_weights[0], expected[1], roundings=1, noise=inside * terms)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gathered_rows_equal_fp64(case, backend, device):
    check_gather_rows(partial(gather_rows, backend=backend), case, device)


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_summed_rows_equal_fp64(case, backend, weighted, device):
    check_sum_rows(partial(sum_rows, backend=backend), case, device, weighted=weighted)


@pytest.mark.slow  # torch.compile takes a minute on two cores
# torch.compile's own import deprecates a function of torch.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_torch_backend_equals_fp64(device):
    check_gather_rows(partial(gather_rows, backend="torch"), SMALL_EXPERTS[5], device)
    check_sum_rows(partial(sum_rows, backend="torch"), SMALL_EXPERTS[5], device)


def test_other_launch_knobs_give_the_same_numbers(device):
    config = RowsConfig(block_tokens=4, block_width=16, num_warps=1)
    case = ExpertsCase(T=37, K=3, E=4, H=100, F=8, capacity=19, is_padded=True)
    check_gather_rows(partial(gather_rows, backend="triton", config=config), case, device)
    check_sum_rows(partial(sum_rows, backend="triton", config=config), case, device)


def test_repeated_calls_give_the_same_bits(device):
    given = rows_inputs(ExpertsCase(T=64, K=4, E=8, H=130, F=8), device)
    first, second = (sum_rows(given.y, given.order, given.weights, backend="triton") for _ in range(2))
    assert torch.equal(first, second)


# Planted faults: each computes something else than the definition, and the oracle must say so.


def _reference_gather(x, order):
    return gather_rows_reference(x, order.tokens_R)


def _reference_sum(y, order, weights):
    return sum_rows_reference(y, order.rows_TK, weights)


def _padding_not_cleared(x, order):
    return gather_rows_reference(x, order.tokens_R.clamp(min=0))


def _tokens_shifted(x, order):
    return gather_rows_reference(x.roll(1, 0), order.tokens_R)


def _last_row_not_written(x, order):
    out = gather_rows_reference(x, order.tokens_R)
    end = int(order.ends_E[-1])
    return torch.cat([out[: end - 1], torch.empty_like(out[end - 1 :])])


def _gradient_of_the_last_choice_missing(x, order):
    with_gradient = torch.ones_like(order.tokens_R, dtype=torch.bool)
    with_gradient[order.rows_TK[:, -1].clamp(min=0)] = False
    out = gather_rows_reference(x, order.tokens_R)
    return torch.where(with_gradient[:, None], out, out.detach())


@pytest.mark.parametrize(
    ("fault", "caught_as"),
    [
        (_padding_not_cleared, "out: a row"),
        (_tokens_shifted, "out: a row"),
        (_last_row_not_written, "out: a row"),
        (_gradient_of_the_last_choice_missing, "dx"),
    ],
)
def test_oracle_of_gather_rows_catches(fault, caught_as, device):
    case = ExpertsCase(T=40, K=2, E=4, H=24, F=16, capacity=33, is_padded=True, dtype=FP32)
    check_gather_rows(_reference_gather, case, device)
    with pytest.raises(AssertionError, match=caught_as):
        check_gather_rows(fault, case, device)


def _weights_dropped(y, order, weights):
    return sum_rows_reference(y, order.rows_TK, 1 + 0 * weights)


def _choices_exchanged(y, order, weights):
    return sum_rows_reference(y, order.rows_TK.flip(1), weights)


def _dropped_choices_counted(y, order, weights):
    return sum_rows_reference(y, order.rows_TK.clamp(min=0), weights)


def _summed_in_bf16(y, order, weights):
    total = 0
    for k in range(weights.shape[1]):
        part = sum_rows_reference(y, order.rows_TK[:, k : k + 1], weights[:, k : k + 1])
        total = (total + part).bfloat16()
    return total


def _gradient_of_the_weights_dropped(y, order, weights):
    return sum_rows_reference(y, order.rows_TK, weights.detach() + 0 * weights)


@pytest.mark.parametrize(
    ("fault", "caught_as"),
    [
        (_weights_dropped, "out"),
        (_choices_exchanged, "out"),
        (_dropped_choices_counted, "out"),
        (_summed_in_bf16, "out"),
        (_gradient_of_the_weights_dropped, "dweights"),
    ],
)
def test_oracle_of_sum_rows_catches(fault, caught_as, device):
    case = ExpertsCase(T=40, K=4, E=4, H=72, F=40, capacity=37, dtype=BF16)
    check_sum_rows(_reference_sum, case, device)
    with pytest.raises(AssertionError, match=caught_as):
        check_sum_rows(fault, case, device)


def test_arguments_that_do_not_fit():
    rows = torch.arange(6, dtype=torch.int32)
    order = Order(rows // 2, rows.view(3, 2), torch.tensor([3, 6], dtype=torch.int32))
    x, y, weights = torch.zeros(3, 8), torch.zeros(6, 8), torch.ones(3, 2)

    def refused(match: str, function: Callable, *arguments, **keywords):
        with pytest.raises(ValueError, match=match):
            function(*arguments, **keywords)

    refused(r"x_TH: expected dtype torch.float32 or torch.bfloat16, found torch.float16", gather_rows, x.half(), order)
    refused(r"x_TH: expected shape \(3, 8\) \(a row for each token\), found \(6, 8\)", gather_rows, y, order)
    refused(r"expected a matrix of one column at least, found shape \(6,\)", sum_rows, y[:, 0].contiguous(), order)
    refused(r"y_RH: expected shape \(6, 8\) \(a row for each of the order's\), found \(3, 8\)", sum_rows, x, order)
    refused(r"weights_TK: expected shape \(3, 2\)", sum_rows, y, order, weights[:2])
    refused(
        r"order.rows_TK: expected contiguous torch.int32 on cpu, found torch.int64",
        sum_rows,
        y,
        replace(order, rows_TK=order.rows_TK.long()),
    )
    refused(r"backend: expected one of reference, .* found 'cuda'", gather_rows, x, order, backend="cuda")
