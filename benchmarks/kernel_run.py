"""What benchmarks of kernels share: the clock, the machine's rates, and the run over operations and cases."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import ckptbridge
from ckptbridge.kernels.backend import triton


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Bytes read and written, and FLOPs of bf16 products, a second."""

    device: torch.device
    bandwidth: float
    product_rate: float


Timed = Callable[..., Iterator[Any]]
Operations = Mapping[str, tuple[Timed, list, list]]
"""By name: what times a case and gives rows of the table, the cases of a GPU, those that show on a CPU that it runs."""


def captured(call: Callable[[], object], calls: int = 1) -> torch.cuda.CUDAGraph:
    """A CUDA graph of so many calls; kernels are compiled before."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            call()
    return graph


def time_us(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Microseconds of one call: the median of replays of a graph of `calls` of them, so that short ones are not lost.

    On a CPU it is called once, for its errors, and the time is nothing.
    """
    if device.type != "cuda":
        call()
        return 0.0
    graph = captured(call, calls)
    return 1e3 * triton.testing.do_bench(graph.replay, warmup=25, rep=150, return_mode="median") / calls


def measured_machine(device: torch.device) -> Machine:
    """A copy of 2 GiB, and a product of 16384 x 4096 x 28672."""
    if device.type != "cuda":
        return Machine(device=device, bandwidth=1e12, product_rate=1e15)
    source = torch.randn(2**30, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / (time_us(lambda: target.copy_(source), device) / 1e6)
    a, b = (torch.randn(shape, dtype=torch.bfloat16, device=device) for shape in ((16384, 4096), (28672, 4096)))
    flops = 2 * 16384 * 4096 * 28672
    return Machine(device=device, bandwidth=bandwidth, product_rate=flops / (time_us(lambda: a @ b.t(), device) / 1e6))


def run(name: str, description: str | None, title: str, head: str, operations: Operations) -> int:
    """Parse the command line of benchmarks/`name`.py and run; the results go to `name`.json and `name`.md.

    What fails is told and does not stop the others; then the exit status, which this returns, is 1.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help=f"folder for {name}.json and {name}.md")
    parser.add_argument("--tune", action="store_true", help="also time other launch knobs")
    parser.add_argument("--only", nargs="+", choices=list(operations), default=list(operations))
    parser.add_argument("--plumbing", action="store_true", help="small cases, on a CPU")
    options = parser.parse_args()
    if not options.plumbing and not (options.out and torch.cuda.is_available()):
        parser.error("timing needs a GPU and --out; --plumbing needs neither")

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    machine = measured_machine(device)
    facts = _facts(name, machine)
    print("\n".join(f"{key}: {value}" for key, value in facts.items()), flush=True)
    rows: list[Any] = []
    failed = False
    for operation in options.only:
        timed, real, small = operations[operation]
        for case in small if options.plumbing else real:
            try:
                for row in timed(case, machine, tune=options.tune):
                    print(row, flush=True)
                    rows.append(row)
            except Exception:  # one operation that breaks shall not cost the others' times
                failed = True
                print(f"{operation} {case}:\n{traceback.format_exc()}", flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        numbers = facts | {"rows": [asdict(row) for row in rows]}
        (options.out / f"{name}.json").write_text(json.dumps(numbers, indent=1) + "\n")
        lines = [f"# {title}", "", *(f"- {key}: {value}" for key, value in facts.items()), "", head]
        (options.out / f"{name}.md").write_text("\n".join([*lines, *map(str, rows), ""]))
    return int(failed)


def _facts(name: str, machine: Machine) -> dict[str, str]:
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name(machine.device) if machine.device.type == "cuda" else "cpu",
        "copy bandwidth": f"{machine.bandwidth / 1e12:.2f} TB/s",
        "16384x4096x28672 product": f"{machine.product_rate / 1e12:.0f} TFLOP/s",
        "versions": f"ckptbridge {ckptbridge.__version__}, torch {torch.__version__}, triton {triton.__version__}, "
        f"Python {platform.python_version()}",
        "command": " ".join(["python", f"benchmarks/{name}.py", *sys.argv[1:]]),
    }
