"""A few random cases of every kernel, and faults that random cases find (benchmarks/kernel_fuzz.py runs thousands)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels import drawn

CASES = 3 if torch.cuda.is_available() else 6  # a GPU compiles most of them
ENOUGH = 40  # cases, one of which shows any fault below
# Lanes behind the last column hold anything, and numpy says what their exp is.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


def _check(operation: str, cases: int, device: torch.device) -> None:
    for number in range(cases):
        case, check = drawn.drawn(operation, number)
        try:
            check(device)
        except AssertionError as error:
            raise AssertionError(f"case {number}: {case}") from error


@pytest.mark.parametrize("operation", drawn.DRAWN)
def test_random_cases_equal_fp64(operation, device):
    _check(operation, CASES, device)


def test_a_number_is_one_case():
    assert drawn.drawn("experts", 7)[0] == drawn.drawn("experts", 7)[0]
    assert len({drawn.drawn("experts", number)[0] for number in range(20)}) == 20


def _halve_last_row(out: Any) -> Any:
    if isinstance(out, tuple):
        return (_halve_last_row(out[0]), *out[1:])
    return torch.cat([out[:-1], out[-1:] * 0.5]) if out.ndim and len(out) else out * 0.5


def _last_row_halved(operation: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments, **keywords: _halve_last_row(operation(*arguments, **keywords))


def _last_element_left(position: int, operation: Callable[..., Any]) -> Callable[..., Any]:
    """The last element of what is written in place stays as it was."""

    def run(*arguments, **keywords):
        last = arguments[position].view(-1)[-1:]
        before = last.clone()
        result = operation(*arguments, **keywords)
        last.copy_(before)
        return result

    return run


def _rows_in_reverse(operation: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments, **keywords):
        order = operation(*arguments, **keywords)
        return replace(order, rows_TK=order.rows_TK.flip(0))

    return run


def _last_argument_dropped(operation: Callable[..., Any]) -> Callable[..., Any]:
    return lambda first, *others, **keywords: operation(first[:-1] or first, *others, **keywords)


def _logits_off(operation: Callable[..., Any]) -> Callable[..., Any]:
    return lambda logits, *others, **keywords: operation(logits * 1.01, *others, **keywords)


FAULTS: dict[str, tuple[str, Callable[[Callable[..., Any]], Callable[..., Any]]]] = {
    "adam": ("adam_step", lambda operation: _last_element_left(1, operation)),
    "cross_entropy": ("linear_cross_entropy", _last_row_halved),
    "embedding": ("embedding", _last_row_halved),
    "experts": ("experts", _last_row_halved),
    "gather": ("sum_rows", _last_row_halved),
    "gradient_norm": ("gradient_norm", _last_argument_dropped),
    "grouped_matmul": ("grouped_matmul", _last_row_halved),
    "grouped_weight_gradient": ("grouped_weight_gradient", lambda operation: _last_element_left(3, operation)),
    "order": ("order_by_expert", _rows_in_reverse),
    "rms_norm": ("rms_norm", _last_row_halved),
    "router_logits": ("router_logits", _last_row_halved),
    "routing": ("route", _logits_off),
    "split_qkv": ("split_qkv", _last_row_halved),
    "swiglu": ("swiglu", _last_row_halved),
    "token_losses": ("token_losses", _last_row_halved),
}


@pytest.mark.parametrize("operation", drawn.DRAWN)
def test_random_cases_find_a_planted_fault(operation, device, monkeypatch):
    name, fault = FAULTS[operation]
    monkeypatch.setattr(drawn, name, fault(getattr(drawn, name)))
    with pytest.raises(AssertionError):
        _check(operation, ENOUGH, device)
