"""The kernels of a mixture layer one by one, each beside its floor: the bytes or products that it cannot do without.

Shapes: T tokens, H hidden_size, E experts, K top-k, F ffn width of an expert, R = T*K routed rows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise

import torch
from kernel_run import captured
from peers.moe import Shape
from torch import Tensor

from ckptbridge.kernels.activation import activate, activate_backward
from ckptbridge.kernels.gather import gather_rows, sum_rows
from ckptbridge.kernels.grouped_gemm import grouped_matmul, grouped_weight_gradient
from ckptbridge.kernels.order import order_by_expert
from ckptbridge.kernels.router_logits import router_logits
from ckptbridge.kernels.routing import route

CALLS = 5
"""In one graph: a kernel of some microseconds is timed together with its like."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One kernel; microseconds. The floor is that of its bytes at the rate of a copy, or of its products at the rate
    of one dense product of as many operations, whichever is higher."""

    slice: str
    spread: str
    name: str
    us: float
    floor_us: float
    bound: str

    def as_row(self) -> dict[str, str | float]:
        return {key: round(value, 2) if isinstance(value, float) else value for key, value in asdict(self).items()}


@torch.no_grad()
def measured_parts(shape: Shape, spread: str, x_TH: Tensor, router_EH: Tensor) -> list[Part]:
    """Time every kernel of a forward and backward pass, as `experts` calls them."""
    bandwidth, rates = copy_bandwidth(x_TH.device), _dense_rates(shape, x_TH)
    found = []
    for name, call, nbytes, flops, rate in _calls(shape, x_TH, router_EH):
        of_bytes, of_products = nbytes / bandwidth * 1e6, flops / rates[rate] * 1e6 if flops else 0.0
        bound = "bytes" if of_bytes > of_products else "products"
        try:
            us = graph_us(call, x_TH.device)
        except Exception as error:  # one kernel that does not compile leaves the others to be timed
            print(f"{shape.name} {spread} {name}: {type(error).__name__}: {error}"[:600], flush=True)
            continue
        floor = max(of_bytes, of_products)
        found.append(Part(slice=shape.name, spread=spread, name=name, us=us, floor_us=floor, bound=bound))
    return found


def _calls(
    shape: Shape, x_TH: Tensor, router_EH: Tensor
) -> Iterator[tuple[str, Callable[[], object], float, float, str]]:
    """Name, call, least bytes, operations, and which dense product has as many."""
    T, H, E, K, F, R = shape.T, shape.H, shape.E, shape.K, shape.F, shape.T * shape.K
    logits_TE = router_logits(x_TH, router_EH, backend="triton")
    routes = route(logits_TE, topk=K, backend="triton")
    order = order_by_expert(routes.experts_TK, E, backend="triton")
    ends_E, weights_TK = order.ends_E, routes.weights_TK
    fc1 = 0.02 * torch.randn(E, 2 * F, H, dtype=torch.bfloat16, device=x_TH.device)
    fc2 = 0.02 * torch.randn(E, H, F, dtype=torch.bfloat16, device=x_TH.device)
    d_TH = torch.randn_like(x_TH)

    yield "router logits", partial(router_logits, x_TH, router_EH, backend="triton"), 2 * T * H + 4 * T * E, 0, ""
    yield "route", partial(route, logits_TE, topk=K, backend="triton"), 4 * T * E + 8 * R, 0, ""
    yield "order", partial(order_by_expert, routes.experts_TK, E, backend="triton"), 12 * R, 0, ""
    yield "gather x", partial(gather_rows, x_TH, order, backend="triton"), 2 * (T + R) * H, 0, ""
    x_RH = gather_rows(x_TH, order, backend="triton")
    products = partial(_products, ends_E, order.tokens_R)
    h_RO = grouped_matmul(x_RH, fc1, ends_E, transposed=True, backend="torch")
    yield from products("fc1", x_RH, x_TH, fc1, True, 4 * R * H * F, "fc1")
    yield "activation", partial(activate, h_RO, "swiglu", backend="triton"), 6 * R * F, 0, ""
    a_RF = activate(h_RO, "swiglu", backend="triton")
    yield from products("fc2", a_RF, None, fc2, True, 2 * R * H * F, "fc2")
    y_RH = torch.randn_like(x_RH)
    yield "sum", partial(sum_rows, y_RH, order, weights_TK, backend="triton"), 2 * (T + R) * H, 0, ""
    yield from products("d hidden", y_RH, d_TH, fc2, False, 2 * R * H * F, "fc2")
    d_RF = torch.randn_like(a_RF)
    backward = partial(activate_backward, h_RO.clone(), d_RF, order.rows_TK, weights_TK, "swiglu", backend="triton")
    yield "activation backward", backward, 12 * R * F, 0, ""
    yield from _gradients("fc2's gradient", ends_E, order.tokens_R, (y_RH, d_TH), (a_RF, None), 2 * R * H * F, "fc2")
    yield from _gradients("fc1's gradient", ends_E, order.tokens_R, (h_RO, None), (x_RH, x_TH), 4 * R * H * F, "fc1")
    yield from products("dx", h_RO, None, fc1, False, 4 * R * H * F, "fc1")


def _products(
    ends_E: Tensor,
    tokens_R: Tensor,
    name: str,
    sorted_rows: Tensor,
    tokens: Tensor | None,
    weight: Tensor,
    transposed: bool,
    flops: float,
    rate: str,
) -> Iterator[tuple[str, Callable[[], object], float, float, str]]:
    """A product of rows and matrices: torch's, ours, and ours that gathers the rows of tokens."""
    product = partial(grouped_matmul, weight=weight, ends_E=ends_E, transposed=transposed)
    for backend in ("torch", "triton"):
        yield f"{name}, {backend}", partial(product, sorted_rows, backend=backend), 0, flops, rate
    if tokens is not None:
        yield f"{name}, gathering", partial(product, tokens, rows_R=tokens_R, backend="triton"), 0, flops, rate


def _gradients(
    name: str,
    ends_E: Tensor,
    tokens_R: Tensor,
    d: tuple[Tensor, Tensor | None],
    x: tuple[Tensor, Tensor | None],
    flops: float,
    rate: str,
) -> Iterator[tuple[str, Callable[[], object], float, float, str]]:
    """A gradient of matrices, added to fp32 sums: torch's, ours, and ours that gathers the rows of tokens."""
    (d_rows, d_tokens), (x_rows, x_tokens) = d, x
    total = torch.zeros(len(ends_E), d_rows.shape[1], x_rows.shape[1], dtype=torch.float32, device=d_rows.device)
    gradient = partial(grouped_weight_gradient, ends_E=ends_E, out_EOI=total, accumulate=True)
    nbytes = 2 * total.nbytes
    for backend in ("torch", "triton"):
        yield f"{name}, {backend}", partial(gradient, d_rows, x_rows, backend=backend), nbytes, flops, rate
    gathered = partial(
        gradient,
        d_rows if d_tokens is None else d_tokens,
        x_rows if x_tokens is None else x_tokens,
        d_rows_R=None if d_tokens is None else tokens_R,
        x_rows_R=None if x_tokens is None else tokens_R,
        backend="triton",
    )
    yield f"{name}, gathering", gathered, nbytes, flops, rate


def _dense_rates(shape: Shape, x_TH: Tensor) -> dict[str, float]:
    """Operations a second of one dense product of all rows, in the shapes of fc1 and of fc2."""
    R, rates = shape.T * shape.K, {}
    for name, depth, columns in (("fc1", shape.H, 2 * shape.F), ("fc2", shape.F, shape.H)):
        a = torch.randn(R, depth, dtype=torch.bfloat16, device=x_TH.device)
        b = torch.randn(columns, depth, dtype=torch.bfloat16, device=x_TH.device)
        rates[name] = 2 * R * depth * columns / (graph_us(lambda a=a, b=b: a @ b.t(), x_TH.device) / 1e6)
    return rates


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read plus bytes written a second, of a large copy."""
    source = torch.zeros(2**30 if device.type == "cuda" else 2**20, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (graph_us(lambda: target.copy_(source), device) / 1e6)


def graph_us(call: Callable[[], object], device: torch.device) -> float:
    """Microseconds that the device spends on one call: the median of replays of a graph of some."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return (time.perf_counter() - began) * 1e6
    graph = captured(call, CALLS)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(8)]
    graph.replay()
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return 1e3 * statistics.median(a.elapsed_time(b) for a, b in pairwise(marks)) / CALLS


PARTS_HEAD = """
| slice | spread | kernel | us | floor us | of floor | bound by |
|---|---|---|--:|--:|--:|---|"""


def parts_lines(parts: list[Part]) -> list[str]:
    """The parts as rows of markdown."""
    return [
        f"| {part.slice} | {part.spread} | {part.name} | {part.us:.1f} | {part.floor_us:.1f} "
        f"| {part.floor_us / part.us:.0%} | {part.bound} |"
        for part in parts
    ]
