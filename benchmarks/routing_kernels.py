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

import argparse
import json
import platform
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ckptbridge
from ckptbridge.kernels.backend import triton
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Bytes read and written a second."""

    device: torch.device
    bandwidth: float


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


def time_us(call: Callable[[], object], device: torch.device) -> float:
    """Microseconds of one call; on a CPU it is called once, for its errors, and the time is nothing."""
    if device.type != "cuda":
        call()
        return 0.0
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(CALLS):
            call()
    return 1e3 * triton.testing.do_bench(graph.replay, warmup=25, rep=100, return_mode="median") / CALLS


def measured_machine(device: torch.device) -> Machine:
    """A copy of 2 GiB."""
    if device.type != "cuda":
        return Machine(device=device, bandwidth=1e12)
    source = torch.randn(2**30, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return Machine(device=device, bandwidth=2 * source.nbytes / (time_us(lambda: target.copy_(source), device) / 1e6))


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


def main() -> int:
    """Parse the command line and run. What fails is told and does not stop the others; then the exit status is 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for routing_kernels.json and routing_kernels.md")
    parser.add_argument("--tune", action="store_true", help="also time other launch knobs")
    parser.add_argument("--only", nargs="+", choices=list(OPERATIONS), default=list(OPERATIONS))
    parser.add_argument("--plumbing", action="store_true", help="small cases, on a CPU")
    options = parser.parse_args()
    if not options.plumbing and not (options.out and torch.cuda.is_available()):
        parser.error("timing needs a GPU and --out; --plumbing needs neither")

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    machine = measured_machine(device)
    facts = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "copy bandwidth": f"{machine.bandwidth / 1e12:.2f} TB/s",
        "versions": f"ckptbridge {ckptbridge.__version__}, torch {torch.__version__}, triton {triton.__version__}, "
        f"Python {platform.python_version()}",
        "command": " ".join(["python", "benchmarks/routing_kernels.py", *sys.argv[1:]]),
    }
    print("\n".join(f"{key}: {value}" for key, value in facts.items()), flush=True)
    rows: list[Row] = []
    failed = False
    for name in options.only:
        timed, real, small = OPERATIONS[name]
        for case in small if options.plumbing else real:
            try:
                for row in timed(case, machine, tune=options.tune):
                    print(row, flush=True)
                    rows.append(row)
            except Exception:  # one operation that breaks shall not cost the others' times on a lent GPU
                failed = True
                print(f"{name} {case}:\n{traceback.format_exc()}", flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        numbers = facts | {"rows": [asdict(row) for row in rows]}
        (options.out / "routing_kernels.json").write_text(json.dumps(numbers, indent=1) + "\n")
        head = (
            "| operation | case | pass | floor us | triton us | reference us | knobs |\n|---|---|---|--:|--:|--:|---|"
        )
        lines = ["# The router's kernels", "", *(f"- {key}: {value}" for key, value in facts.items()), "", head]
        (options.out / "routing_kernels.md").write_text("\n".join([*lines, *map(str, rows), ""]))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
