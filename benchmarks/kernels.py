"""Speed of the kernels on one GPU, beside their reference, torch.compile of it, and the memory floor.

    PYTHONPATH=. python benchmarks/kernels.py --out benchmarks/results    check, time, write kernels.json, kernels.md
    PYTHONPATH=. python benchmarks/kernels.py --out FOLDER --tune         also time the neighbours of the launch knobs
    PYTHONPATH=. python benchmarks/kernels.py --check-only                every kernel on every case against fp64
    TRITON_INTERPRET=1 PYTHONPATH=. python benchmarks/kernels.py --check-only     the same on a CPU, small cases

Times are medians of CUDA-event times of the public operation, autograd and all, with several sets of inputs in turn so
that none is left in the cache. The floor is the least traffic (each input read once, each output written once) over
the bandwidth of a large copy, measured in the same run. What is timed is first checked, on the same case.
"""

from __future__ import annotations

import argparse
import json
import platform
import secrets
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch._functorch.config
from torch import Tensor

import ckptbridge
from ckptbridge.kernels.backend import require_backend, triton
from ckptbridge.kernels.rms_norm import RmsNormConfig, rms_norm, rms_norm_reference
from ckptbridge.kernels.swiglu import SwigluConfig, swiglu, swiglu_reference
from tests.kernels.cases import REAL_RMS_NORM, REAL_SWIGLU, SMALL_RMS_NORM, SMALL_SWIGLU, RmsNormCase, SwigluCase
from tests.kernels.oracle_rms_norm import check_rms_norm, rms_norm_inputs
from tests.kernels.oracle_swiglu import check_swiglu, swiglu_inputs

Case = RmsNormCase | SwigluCase


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call with one set of inputs: its arguments, those of them with gradients, the gradients of its outputs."""

    arguments: tuple
    leaves: list[Tensor]
    output_gradients: list[Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table; times in microseconds."""

    operation: str
    case: str
    direction: str  # forward, backward
    floor: float
    triton: float
    triton_again: float  # the same measured a second time: a difference smaller than this spread is noise
    compiled: float
    reference: float


class RmsNormBenchmark:
    """rms_norm: how to call it, check it, count its bytes and vary its launch."""

    name = "rms_norm"
    operation = staticmethod(rms_norm)
    reference = staticmethod(rms_norm_reference)
    check = staticmethod(check_rms_norm)
    check_compiled = staticmethod(partial(check_rms_norm, fused=False))
    real, small = REAL_RMS_NORM, SMALL_RMS_NORM

    @staticmethod
    def call(case: RmsNormCase, device: torch.device, seed: int) -> Call:
        given = rms_norm_inputs(case, device, seed)
        arguments = (given.x, given.weight, case.eps, given.residual)
        return Call(arguments=arguments, leaves=given.leaves, output_gradients=given.output_gradients)

    @staticmethod
    def floor_bytes(case: RmsNormCase) -> dict[str, int]:
        one_pass = case.R * case.H * case.dtype.itemsize
        return {"forward": (4 if case.has_residual else 2) * one_pass, "backward": (3 + case.has_residual) * one_pass}

    @staticmethod
    def neighbours(case: RmsNormCase) -> Iterator[tuple[str, RmsNormConfig]]:
        """One knob at a time, but for the two that share the registers and shared memory of the backward pass."""
        knobs = RmsNormConfig.from_shape(case.H, case.dtype.itemsize)
        yield "default", knobs
        for factor in (0.5, 2):
            yield f"forward warps x{factor}", replace(knobs, num_warps_forward=int(knobs.num_warps_forward * factor))
            yield f"backward warps x{factor}", replace(knobs, num_warps_backward=int(knobs.num_warps_backward * factor))
        yield "rows x2", replace(knobs, block_rows=2 * knobs.block_rows)
        for programs, stages in product((1, 2, 3, 4), (1, 2, 3, 4)):
            changed = replace(knobs, programs_per_multiprocessor=programs, num_stages_backward=stages)
            yield f"programs {programs} stages {stages}", changed


class SwigluBenchmark:
    """swiglu: how to call it, check it, count its bytes and vary its launch."""

    name = "swiglu"
    operation = staticmethod(swiglu)
    reference = staticmethod(swiglu_reference)
    check = check_compiled = staticmethod(check_swiglu)
    real, small = REAL_SWIGLU, SMALL_SWIGLU

    @staticmethod
    def call(case: SwigluCase, device: torch.device, seed: int) -> Call:
        given = swiglu_inputs(case, device, seed)
        return Call(arguments=(given.x,), leaves=[given.x], output_gradients=[given.d_out])

    @staticmethod
    def floor_bytes(case: SwigluCase) -> dict[str, int]:
        one_pass = case.R * case.F * case.dtype.itemsize
        return {"forward": 3 * one_pass, "backward": 5 * one_pass}

    @staticmethod
    def neighbours(case: SwigluCase) -> Iterator[tuple[str, SwigluConfig]]:
        """One knob at a time."""
        knobs = SwigluConfig.from_shape(case.F)
        yield "default", knobs
        for factor in (0.5, 2):
            yield f"warps x{factor}", replace(knobs, num_warps=int(knobs.num_warps * factor))
        yield "rows x2", replace(knobs, block_rows=2 * knobs.block_rows)
        if knobs.block_rows > 1:
            yield "rows x0.5", replace(knobs, block_rows=knobs.block_rows // 2)


BENCHMARKS = [RmsNormBenchmark, SwigluBenchmark]
Benchmark = type[RmsNormBenchmark] | type[SwigluBenchmark]


def check(device: torch.device, seed: int) -> None:
    """Every Triton kernel, forward and backward, on every case; raises at the first that is off."""
    for benchmark in BENCHMARKS:
        cases = benchmark.small + (benchmark.real if device.type == "cuda" else [])
        for case in cases:
            _checked(benchmark.check, partial(benchmark.operation, backend="triton"), case, device, seed)
        print(f"{benchmark.name}: {len(cases)} cases agree with fp64, forward and backward (seed {seed})")


def measure(device: torch.device, bandwidth: float, seed: int) -> Iterator[Row]:
    """Time all implementations on the real cases. `bandwidth` in bytes a second."""
    for benchmark in BENCHMARKS:
        for case in benchmark.real:
            torch._dynamo.reset()  # else the second shape is compiled for every shape
            implementations = {
                "triton": partial(benchmark.operation, backend="triton"),
                "compiled": torch.compile(benchmark.reference, dynamic=False),
                "reference": benchmark.reference,
            }
            _checked(benchmark.check, implementations["triton"], case, device, seed)
            _checked(benchmark.check_compiled, implementations["compiled"], case, device, seed)
            calls = _calls(benchmark, case, device, seed)
            times = {name: _time(implementation, calls) for name, implementation in implementations.items()}
            again = _time(implementations["triton"], calls)
            for direction, count in benchmark.floor_bytes(case).items():
                row = Row(
                    operation=benchmark.name,
                    case=str(case),
                    direction=direction,
                    floor=count / bandwidth * 1e6,
                    triton_again=again[direction],
                    **{name: time[direction] for name, time in times.items()},
                )
                print(_line(row), flush=True)
                yield row


def tune(device: torch.device, seed: int) -> Iterator[dict[str, str | float]]:
    """Time the Triton kernels with the neighbours of their launch knobs, one knob at a time."""
    for benchmark in BENCHMARKS:
        for case in benchmark.real:
            calls = _calls(benchmark, case, device, seed)
            for name, knobs in benchmark.neighbours(case):
                try:
                    times = _time(partial(benchmark.operation, backend="triton", config=knobs), calls)
                except triton.runtime.errors.OutOfResources as error:
                    print(f"{benchmark.name} {case} {name}: does not fit ({error})")
                    continue
                shown = ", ".join(f"{direction} {time:.1f}" for direction, time in times.items())
                print(f"{benchmark.name} {case} {name}: {shown} us", flush=True)
                yield {"operation": benchmark.name, "case": str(case), "knobs": name, **times}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read plus bytes written a second, of a 2 GiB copy."""
    source = torch.randn(2**30, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (_median_us(lambda: target.copy_(source)) / 1e6)


def _checked(oracle: Callable, operation: Callable, case: Case, device: torch.device, seed: int) -> None:
    try:
        oracle(operation, case, device, seed=seed)
    except AssertionError as error:
        raise SystemExit(f"{type(case).__name__} {case}, seed {seed}: {error}") from error


def _calls(benchmark: Benchmark, case: Case, device: torch.device, seed: int) -> list[Call]:
    """As many sets of inputs as make four times the cache, two at least."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    count = max(2, -(-4 * cache // benchmark.floor_bytes(case)["forward"]))
    return [benchmark.call(case, device, seed + i) for i in range(count)]


def _time(operation: Callable, calls: list[Call]) -> dict[str, float]:
    """Microseconds that the GPU spends on the forward and on the backward pass of one call.

    Both are replayed as CUDA graphs: the host needs 0.2 ms for a backward pass, longer than many kernels take.
    The backward pass is what both together take beyond the forward one.
    """

    def both(call: Call) -> None:
        torch.autograd.grad(operation(*call.arguments), call.leaves, call.output_gradients)

    forward = _graph_us(lambda call: operation(*call.arguments), calls)
    return {"forward": forward, "backward": _graph_us(both, calls) - forward}


def _graph_us(step: Callable[[Call], object], calls: list[Call]) -> float:
    """Microseconds of one `step`, from a graph that makes one of each call."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in 2 * calls:
            step(call)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            step(call)
    return _median_us(graph.replay) / len(calls)


def _median_us(function: Callable[[], object]) -> float:
    return 1e3 * triton.testing.do_bench(function, warmup=25, rep=100, return_mode="median")


HEAD = "| operation | case | pass | floor us | triton us | of floor | torch.compile us | reference us |"


def _line(row: Row) -> str:
    return (
        f"| {row.operation} | {row.case} | {row.direction} | {row.floor:.1f} | {row.triton:.1f} "
        f"| {row.floor / row.triton:.0%} | {row.compiled:.1f} | {row.reference:.1f} |"
    )


def _markdown(facts: dict[str, str], rows: list[Row]) -> str:
    lines = ["# Kernels", "", *(f"- {key}: {value}" for key, value in facts.items())]
    lines += ["", HEAD, "|---|---|---|--:|--:|--:|--:|--:|", *map(_line, rows), ""]
    return "\n".join(lines)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for kernels.json and kernels.md")
    parser.add_argument("--check-only", action="store_true", help="compare with fp64, time nothing")
    parser.add_argument("--tune", action="store_true", help="also time the neighbours of the launch knobs")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31), help="default: a fresh one")
    options = parser.parse_args()
    if not options.check_only and options.out is None:
        parser.error("--out is needed, or --check-only")

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    require_backend("triton", device)
    if device.type != "cuda" and not options.check_only:
        parser.error("timing needs a GPU; --check-only does not")
    check(device, options.seed)
    if options.check_only:
        return
    bandwidth = copy_bandwidth(device)
    facts = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name(device),
        "copy bandwidth": f"{bandwidth / 1e12:.2f} TB/s",
        "versions": f"ckptbridge {ckptbridge.__version__}, torch {torch.__version__}, triton {triton.__version__}, "
        f"Python {platform.python_version()}",
        "command": " ".join(["python", "benchmarks/kernels.py", *sys.argv[1:]]),
    }
    print("\n".join(f"{key}: {value}" for key, value in facts.items()))
    tuned = list(tune(device, options.seed)) if options.tune else []
    rows = list(measure(device, bandwidth, options.seed))

    options.out.mkdir(parents=True, exist_ok=True)
    numbers = facts | {"rows": [asdict(row) for row in rows]} | ({"tuned": tuned} if tuned else {})
    (options.out / "kernels.json").write_text(json.dumps(numbers, indent=1) + "\n")
    (options.out / "kernels.md").write_text(_markdown(facts, rows))
    print(_markdown(facts, rows))


if __name__ == "__main__":
    main()
