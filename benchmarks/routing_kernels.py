"""Speed of the router's kernels on one GPU, beside their references and the memory floor: logits, routes, order.

    PYTHONPATH=. python benchmarks/routing_kernels.py --out benchmarks/results     check, time, write routing_kernels.md
    PYTHONPATH=. python benchmarks/routing_kernels.py --out FOLDER --tune          also other launch knobs
    TRITON_INTERPRET=1 PYTHONPATH=. python benchmarks/routing_kernels.py --plumbing    small cases on a CPU, no times

Times are medians of replays of a CUDA graph of 20 calls, over 20: a kernel of 5 us alone would be lost in the replay.
That a call can be captured also shows that it waits for nothing. "both" is forward and backward. The floor is the least
traffic over the bandwidth of a large copy, measured in the same run; what is small enough stays in the cache and
can be faster. Everything is checked, routes and logits against fp64, the order against a loop, before it is timed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from kernel_run import Machine, run
from kernel_run import time_us as time_of
from torch import Tensor

from ckptbridge.kernels.order import OrderConfig, order_by_expert
from ckptbridge.kernels.router_logits import router_logits
from ckptbridge.kernels.routing import RoutingConfig, route
from tests.kernels.cases_routing import (
    REAL_LOGITS,
    REAL_ORDER,
    REAL_ROUTE,
    SMALL_LOGITS,
    SMALL_ORDER,
    SMALL_ROUTE,
    LogitsCase,
    OrderCase,
    RouteCase,
)
from tests.kernels.oracle_order import check_order, order_case
from tests.kernels.oracle_routing import check_route, check_router_logits, logits_inputs, route_inputs

CALLS = 20

time_us = partial(time_of, calls=CALLS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table; times in microseconds."""

    operation: str
    case: str
    what: str
    floor: float
    triton: float
    reference: float | None = None
    knobs: str = ""

    def __str__(self) -> str:
        reference = "" if self.reference is None else f"{self.reference:.1f}"
        name = f"{self.operation} | {self.case} | {self.what}"
        return f"| {name} | {self.floor:.1f} | {self.triton:.1f} | {reference} | {self.knobs} |"


def time_order(case: OrderCase, machine: Machine, *, tune: bool) -> Iterator[Row]:
    """Read twice and written twice: 4 bytes a choice each time."""
    arguments, keywords = order_case(case, machine.device)
    check_order(partial(order_by_expert, backend="triton"), case, machine.device)
    row = partial(
        Row, operation="order", case=str(case), what="forward", floor=16 * case.T * case.K / machine.bandwidth * 1e6
    )
    ours, theirs = (
        time_us(partial(order_by_expert, *arguments, **keywords, backend=backend), machine.device)
        for backend in ("triton", "reference")
    )
    yield row(triton=ours, reference=theirs)
    names = [field.name for field in fields(OrderConfig)]
    for knobs in _neighbours(OrderConfig(), **dict.fromkeys(names, 2)) if tune else ():
        call = partial(order_by_expert, *arguments, **keywords, backend="triton", config=knobs)
        yield row(triton=time_us(call, machine.device), knobs=_changed(knobs, OrderConfig()))


def time_route(case: RouteCase, machine: Machine, *, tune: bool) -> Iterator[Row]:
    """Logits are read forward; backward they are read again and their gradient is written."""
    check_route(partial(route, backend="triton"), case, machine.device)
    given = route_inputs(case, machine.device)
    forward_bytes = 4 * case.T * case.E + 8 * case.T * case.K
    floors = {"forward": forward_bytes, "both": 2 * forward_bytes + 4 * case.T * case.E}

    def calls(backend: str, knobs: RoutingConfig | None = None) -> dict[str, Callable[[], object]]:
        def forward() -> tuple[Tensor, ...]:
            routes = route(
                given.logits,
                given.bias,
                topk=case.K,
                score_function=case.score_function,
                pre_softmax=case.pre_softmax,
                scaling_factor=case.scaling_factor,
                backend=backend,
                config=knobs,
            )
            return routes.weights_TK, routes.probability_sum_E, routes.z_sum

        return {
            "forward": forward,
            "both": lambda: torch.autograd.grad(forward(), given.logits, given.output_gradients),
        }

    ours, theirs = calls("triton"), calls("reference")
    for what, nbytes in floors.items():
        row = partial(Row, operation="route", case=str(case), what=what, floor=nbytes / machine.bandwidth * 1e6)
        yield row(triton=time_us(ours[what], machine.device), reference=time_us(theirs[what], machine.device))
        default = RoutingConfig.from_shape(case.E)
        varied = {"block_tokens": 2, "num_warps": 2, "programs_per_multiprocessor": 2}
        for knobs in _neighbours(default, **varied) if tune else ():
            taken = time_us(calls("triton", knobs)[what], machine.device)
            yield row(triton=taken, knobs=_changed(knobs, default))


def time_logits(case: LogitsCase, machine: Machine, *, tune: bool) -> Iterator[Row]:
    """Tokens are read forward; backward they are read again and their gradient is written."""
    check_router_logits(partial(router_logits, backend="triton"), case, machine.device)
    given = logits_inputs(case, machine.device)
    forward_bytes = 2 * case.T * case.H + 4 * case.T * case.E
    floors = {"forward": forward_bytes, "both": 2 * forward_bytes + 2 * case.T * case.H}
    for what, nbytes in floors.items():
        times = []
        for backend in ("triton", "reference"):
            call = partial(router_logits, given.x, given.weight, given.bias, backend=backend)
            if what == "both":
                call = partial(_both, call, given.leaves, given.d_logits)
            times.append(time_us(call, machine.device))
        floor = nbytes / machine.bandwidth * 1e6
        ours, theirs = times
        yield Row(operation="logits", case=str(case), what=what, floor=floor, triton=ours, reference=theirs)


def _both(call: Callable[[], Tensor], leaves: list[Tensor], gradient: Tensor) -> object:
    return torch.autograd.grad(call(), leaves, gradient)


def _neighbours(knobs: Any, **factors: int) -> Iterator[Any]:
    """One knob at a time, over and times its factor."""
    for name, factor in factors.items():
        value = getattr(knobs, name)
        yield from (replace(knobs, **{name: changed}) for changed in (value // factor, value * factor) if changed)


def _changed(knobs: Any, default: Any) -> str:
    names = [field.name for field in fields(knobs)]
    return ", ".join(
        f"{name} {getattr(knobs, name)}" for name in names if getattr(knobs, name) != getattr(default, name)
    )


OPERATIONS: dict[str, tuple[Callable[..., Iterator[Row]], list, list]] = {
    "logits": (time_logits, REAL_LOGITS, SMALL_LOGITS),
    "route": (time_route, REAL_ROUTE, SMALL_ROUTE),
    "order": (time_order, REAL_ORDER, [case for case in SMALL_ORDER if case.T < 2000]),
}


HEAD = "| operation | case | pass | floor us | triton us | reference us | knobs |\n|---|---|---|--:|--:|--:|---|"

if __name__ == "__main__":
    sys.exit(run("routing_kernels", __doc__, "The router's kernels", HEAD, OPERATIONS))
