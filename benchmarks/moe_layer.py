"""A mixture layer alone, forward and backward in bf16: ours beside what torch offers and, where it is, SonicMoE.

    PYTHONPATH=. python benchmarks/moe_layer.py --out benchmarks/results                  every slice, both spreads
    PYTHONPATH=. python benchmarks/moe_layer.py --slices qwen3-30b-a3b --parts            and its kernels one by one
    PYTHONPATH=. python benchmarks/moe_layer.py --programs ours-torch sonic --slices ...  SonicMoE compiles for minutes
    PYTHONPATH=. python benchmarks/moe_layer.py --products quack torch triton             our layer with each's products
    TRITON_INTERPRET=1 PYTHONPATH=. python benchmarks/moe_layer.py --slices tiny --parts  on a CPU: that it runs

The layers of a slice get the same tokens and the same router, so the same choices: "balanced" as random numbers fall,
"skewed" with one expert chosen four times as often as the mean. Gradients are new in bf16 ("fresh") or added to fp32
sums ("added"), which each layer does as well as it can. Milliseconds are medians of CUDA-event times, once called from
Python and once as a replayed CUDA graph. TFLOP/s count the products of the routed rows alone, three times forward.
"off" is how far the output and the tokens' gradient are from those of the first program in the table.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from kernel_run import captured
from measuring import RESULTS, command_line, provenance
from moe_parts import PARTS_HEAD, Part, measured_parts, parts_lines
from peers.moe import PRODUCTS, Ours, Plain, Shape, set_router, sonic
from slices import SLICES, TINY
from torch import Tensor, nn

BUSIEST = 4.0
"""How often the busiest expert of the skewed spread is chosen, in means; every token's choice is the limit."""

FURTHEST = 2.0**-6
"""What ours may differ by from each other; a peer rounds its logits and may choose other experts for some tokens."""


def layers(shape: Shape, device: torch.device) -> dict[str, Callable[[], nn.Module]]:
    """By name, what makes each program's layer."""
    ours = {f"ours-{name}": partial(Ours, shape, device, products, "triton") for name, products in PRODUCTS.items()}
    return ours | {
        "plain": partial(Plain, shape, device),
        "plain-compiled": lambda: torch.compile(Plain(shape, device), dynamic=False),
        "sonic": partial(sonic, shape, device),
    }


PROGRAMS = (*(f"ours-{name}" for name in PRODUCTS), "plain", "plain-compiled", "sonic")
BY_NAME = ("ours-reference", "ours-quack", "ours-transformer_engine", "sonic")
"""Those that run when they are asked for: one of them is slow, the others want packages of their own."""


def tokens_and_router(shape: Shape, spread: str, device: torch.device) -> tuple[Tensor, Tensor, float]:
    """x [T, H], the router [E, H], and how often the busiest expert is chosen, in means."""
    generator = torch.Generator(device).manual_seed(1234)
    draw = partial(torch.randn, device=device, generator=generator)
    x_TH, router_EH = draw(shape.T, shape.H), draw(shape.E, shape.H) * shape.H**-0.5
    # Column 0 is the same for all tokens, and only expert 0's router looks at it.
    x_TH[:, 0], router_EH[:, 0] = 1, 0
    x_TH, router_EH = x_TH.bfloat16(), router_EH.bfloat16()

    def choices_of_first(shift: float) -> Tensor:
        router_EH[0, 0] = shift
        chosen = (x_TH.float() @ router_EH.float().T).topk(shape.K, dim=-1).indices
        return torch.bincount(chosen.flatten(), minlength=shape.E)

    mean = shape.T * shape.K / shape.E
    low, high = 0.0, 16.0
    if spread == "skewed":
        for _ in range(12):
            middle = (low + high) / 2
            is_enough = int(choices_of_first(middle)[0]) >= min(BUSIEST * mean, shape.T)
            low, high = (low, middle) if is_enough else (middle, high)
    counts_E = choices_of_first(high if spread == "skewed" else 0.0)
    return x_TH, router_EH, counts_E.max().item() / mean


def run(program: str, shape: Shape, spread: str, gradients: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time one layer; the row of the table."""
    device = options.device
    x_TH, router_EH, busiest = tokens_and_router(shape, spread, device)
    torch.manual_seed(0)  # the same gradient and matrices for all
    d_TH = torch.randn_like(x_TH)
    layer = layers(shape, device)[program]()
    set_router(layer, router_EH)
    if gradients == "added":
        layer.sum_gradients()
    weights = list(layer.parameters())
    x_TH.requires_grad_()

    def forward_backward() -> Tensor:
        for leaf in (x_TH, *weights):
            leaf.grad = None
        out_TH = layer(x_TH)
        out_TH.backward(d_TH)
        return out_TH

    _synchronize(device)
    began = time.perf_counter()
    out_TH = forward_backward()
    _synchronize(device)
    row: dict[str, Any] = {
        "slice": shape.name,
        "program": program,
        "spread": spread,
        "gradients": gradients,
        "busiest": round(busiest, 2),
        "first_s": round(time.perf_counter() - began, 2),
    }
    row["off"] = _difference((shape.name, spread), (out_TH.detach(), x_TH.grad))
    if program.startswith("ours") and row["off"] > FURTHEST:
        raise RuntimeError(f"output or gradient differ from the first program's by {row['off']:.1%}")
    del out_TH
    if device.type == "cuda":
        forward_backward()
        for leaf in (x_TH, *weights):
            leaf.grad = None
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        forward_backward()
        row["peak_gib"] = round((torch.cuda.max_memory_allocated() - held) / 2**30, 2)
    row["ms"] = round(_median_ms(forward_backward, options.times, device), 3)
    row["tflops"] = round(shape.flops / row["ms"] / 1e9, 1)
    try:
        row["graph_ms"] = round(_graph_ms(forward_backward, options.times, device), 3)
        row["graph_tflops"] = round(shape.flops / row["graph_ms"] / 1e9, 1)
    except RuntimeError as error:  # what waits for the device cannot be captured
        row["graph_error"] = str(error).splitlines()[0][:200]
    return row


_FIRST: dict[tuple[str, str], tuple[Tensor, ...]] = {}
"""By slice and spread: the output and the tokens' gradient of the first program."""


def _difference(key: tuple[str, str], results: tuple[Tensor, ...]) -> float:
    """How far the results are from those of the first program, in parts of their norm."""
    first = _FIRST.setdefault(key, tuple(result.clone() for result in results))
    pairs = zip(results, first, strict=True)
    return max(((one - other).float().norm() / other.float().norm()).item() for one, other in pairs)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _median_ms(call: Callable[[], object], times: int, device: torch.device) -> float:
    """Of calls that follow each other: the host runs ahead where it is fast enough."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return (time.perf_counter() - began) * 1e3
    for _ in range(3):
        call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(marks))


def _graph_ms(call: Callable[[], object], times: int, device: torch.device) -> float:
    if device.type != "cuda":
        return _median_ms(call, times, device)
    return _median_ms(captured(call).replay, times, device)


HEAD = """
| slice | spread | gradients | program | ms | TFLOP/s | as a graph, ms | TFLOP/s | peak GiB | first call s | off |
|---|---|---|---|--:|--:|--:|--:|--:|--:|--:|"""


def line(row: dict[str, Any]) -> str:
    """A row as markdown."""
    what = f"| {row['slice']} | {row['spread']} ({row.get('busiest', '?')}) | {row['gradients']} | {row['program']} "
    if "error" in row:
        return f"{what}| {row['error'][:100]} | | | | | | |"
    graph = f"{row['graph_ms']:.2f} | {row['graph_tflops']:.0f}" if "graph_ms" in row else "- | -"
    tail = f"{row.get('peak_gib', '-')} | {row['first_s']} | {row['off']:.1e} |"
    return f"{what}| {row['ms']:.2f} | {row['tflops']:.0f} | {graph} | {tail}"


def write(options: argparse.Namespace, rows: list[dict[str, Any]], parts: list[Part]) -> None:
    """The result files, as far as the run has come."""
    facts = provenance(command_line("moe_layer.py"))
    facts["machine"]["device"] = torch.cuda.get_device_name() if options.device.type == "cuda" else "CPU"
    options.out.mkdir(parents=True, exist_ok=True)
    numbers = facts | {"rows": rows, "parts": [part.as_row() for part in parts]}
    (options.out / "moe-layer.json").write_text(json.dumps(numbers, indent=1) + "\n")
    told = [
        "# A mixture layer alone",
        "",
        f"- {facts['date']}, {facts['machine']['device']}, torch {torch.__version__}",
    ]
    told += [f"- `{facts['command']}`", HEAD, *map(line, rows)]
    told += [PARTS_HEAD, *parts_lines(parts)] if parts else []
    (options.out / "moe-layer.md").write_text("\n".join([*told, ""]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", nargs="+", choices=[*SLICES, TINY.name], default=[*SLICES])
    parser.add_argument("--programs", nargs="*", choices=PROGRAMS, default=[p for p in PROGRAMS if p not in BY_NAME])
    parser.add_argument("--products", nargs="+", choices=PRODUCTS, help="our layer with these, and no other program")
    parser.add_argument("--spreads", nargs="+", choices=("balanced", "skewed"), default=["balanced", "skewed"])
    parser.add_argument("--gradients", nargs="+", choices=("fresh", "added"), default=["fresh", "added"])
    parser.add_argument("--parts", action="store_true", help="also time our kernels one by one, beside their floors")
    parser.add_argument("--times", type=int, default=10, help="timed calls of each")
    parser.add_argument("--budget", type=float, default=540, help="seconds after which nothing more is started")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for moe-layer.json and moe-layer.md")
    options = parser.parse_args()
    if options.products:
        options.programs = [f"ours-{name}" for name in options.products]
    options.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

    began, rows, parts = time.perf_counter(), list[dict[str, Any]](), list[Part]()
    print(HEAD.strip(), flush=True)
    for name in options.slices:
        shape = Shape(TINY if name == TINY.name else SLICES[name])
        if options.parts and time.perf_counter() - began < options.budget:
            spreads = {spread: tokens_and_router(shape, spread, options.device) for spread in options.spreads}
            for spread, (x_TH, router_EH, _) in spreads.items():
                parts += measured_parts(shape, spread, x_TH, router_EH)
            del spreads
            write(options, rows, parts)
        _FIRST.clear()
        torch._dynamo.reset()  # else the second shape is compiled for every shape
        for program in options.programs:
            for gradients in options.gradients:
                for spread in options.spreads:
                    if time.perf_counter() - began > options.budget:
                        print(f"{options.budget:.0f} s are over: {name} {program} {gradients} {spread} is not started")
                        continue
                    try:
                        row = run(program, shape, spread, gradients, options)
                    except Exception as error:  # a peer fails in ways of its own, and the others go on
                        row = {"slice": name, "program": program, "spread": spread, "gradients": gradients}
                        row["error"] = f"{type(error).__name__}: {error}"[:600]
                    rows.append(row)
                    print(line(row), flush=True)
                    write(options, rows, parts)
                    gc.collect()
                    if options.device.type == "cuda":
                        torch.cuda.empty_cache()
    print("\n".join([PARTS_HEAD, *parts_lines(parts)]) if parts else "")


if __name__ == "__main__":
    main()
