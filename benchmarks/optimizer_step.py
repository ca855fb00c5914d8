"""Speed of the gradient norm and of Adam on one GPU, beside the copy rate and torch's own fused AdamW.

    PYTHONPATH=. python benchmarks/optimizer_step.py --out benchmarks/results     check, time, write optimizer_step.json
    PYTHONPATH=. python benchmarks/optimizer_step.py --out FOLDER --tune          also time other launch knobs
    TRITON_INTERPRET=1 PYTHONPATH=. python benchmarks/optimizer_step.py --dry-run     every line once, small, on a CPU

Times are medians of CUDA-event times. The floor is the least traffic (norm: 4 bytes a parameter; Adam: 30 with fp32
moments, 22 with bf16 ones) over the rate of a large copy in the same run. torch's side works on the same flat buffers:
clip_grad_norm_, AdamW(fused=True), and the copy of the fp32 weights into bf16 ones. What is timed is first checked: the
norm against fp64, the last elements against the definition.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

import ckptbridge
from ckptbridge.kernels.adam import AdamConfig, adam_step
from ckptbridge.kernels.backend import require_backend, triton
from ckptbridge.kernels.gradient_norm import GradientNormConfig, clip_coefficient, gradient_norm
from tests.kernels.cases import BF16, FP32
from tests.kernels.cases_adam import REAL_ADAM

BYTES = {"norm": {FP32: 4, BF16: 4}, "adam": {FP32: 30, BF16: 22}}
TAIL = 4096
DRY_SIZES = [5000, 8192]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table; times in milliseconds."""

    operation: str
    parameters: int
    moments: str
    floor: float
    ours: float
    ours_again: float  # the same measured a second time: a difference smaller than this spread is noise
    torch: float | None


class Buffers:
    """The flat buffers of one group, filled with random numbers."""

    def __init__(self, n: int, moments: torch.dtype, device: torch.device) -> None:
        torch.manual_seed(n)
        self.gradient = torch.empty(n, device=device).normal_(std=0.01)
        self.main = torch.empty(n, device=device).normal_(std=0.02)
        self.exp_avg = torch.empty(n, dtype=moments, device=device).normal_(std=0.01)
        self.exp_avg_sq = torch.empty(n, dtype=moments, device=device).uniform_(1e-5, 2e-4)
        self.weight = torch.empty(n, dtype=BF16, device=device)
        self.lr, self.step = torch.tensor(1e-4, device=device), torch.tensor(10.0, device=device)
        self.options = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}

    def adam(self, part: slice = slice(None), **options) -> None:
        """A step of adam_step over some of the elements."""
        tensors = (self.gradient, self.main, self.exp_avg, self.exp_avg_sq, self.weight)
        adam_step(*(tensor[part] for tensor in tensors), lr=self.lr, step=self.step, **self.options, **options)

    def torch_adam(self) -> tuple[torch.optim.AdamW, torch.nn.Parameter]:
        """torch's own over the same buffers; it keeps the moments in fp32."""
        main = torch.nn.Parameter(self.main)
        main.grad = self.gradient
        adam = torch.optim.AdamW([main], lr=1e-4, fused=True, **self.options)
        step = torch.tensor(10.0, device=main.device)
        adam.state[main] = {"step": step, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return adam, main


def check(buffers: Buffers) -> None:
    """The norm against fp64, and the last elements of a step against the definition; raises if they are off."""
    exact = sum(part.double().square().sum() for part in buffers.gradient.split(1 << 27)) ** 0.5
    norm = gradient_norm([buffers.gradient], backend="triton")
    torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0)
    n = buffers.main.numel()
    tail, coefficient = slice(n - TAIL, n), clip_coefficient(norm, 1.0)
    before = [t[tail].clone() for t in (buffers.main, buffers.exp_avg, buffers.exp_avg_sq)]
    options = {"coefficient": coefficient, "first": n - TAIL}
    buffers.adam(tail, backend="reference", **options)
    expected = [t[tail].clone() for t in (buffers.main, buffers.exp_avg, buffers.exp_avg_sq, buffers.weight)]
    for tensor, old in zip((buffers.main, buffers.exp_avg, buffers.exp_avg_sq), before, strict=True):
        tensor[tail] = old
    buffers.weight[tail] = float("nan")
    buffers.adam(backend="triton", coefficient=coefficient)
    found = [t[tail] for t in (buffers.main, buffers.exp_avg, buffers.exp_avg_sq, buffers.weight)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7 if a.dtype == BF16 else 1e-5, atol=1e-9)


def measure(n: int, moments: torch.dtype, device: torch.device, rate: float) -> Iterator[Row]:
    """Time both operations over n parameters. `rate`: bytes a second of a copy."""
    buffers = Buffers(n, moments, device)
    check(buffers)
    coefficient = torch.tensor(0.5, device=device)
    ours: dict[str, Callable[[], object]] = {
        "norm": lambda: gradient_norm([buffers.gradient], backend="triton"),
        "adam": lambda: buffers.adam(backend="triton", coefficient=coefficient),
    }
    theirs: dict[str, Callable[[], object]] = {}
    if moments == FP32:
        adam, main = buffers.torch_adam()

        def step() -> None:
            adam.step()
            buffers.weight.copy_(buffers.main)

        theirs = {"norm": lambda: torch.nn.utils.clip_grad_norm_([main], 1e9), "adam": step}
    for name, operation in ours.items():
        yield Row(
            operation=name,
            parameters=n,
            moments="fp32" if moments == FP32 else "bf16",
            floor=1e3 * n * BYTES[name][moments] / rate,
            ours=median_ms(operation, device),
            ours_again=median_ms(operation, device),
            torch=median_ms(theirs[name], device) if name in theirs else None,
        )


def tune(n: int, device: torch.device) -> Iterator[dict[str, str | float]]:
    """Time other launch knobs."""
    for moments in (FP32, BF16):
        buffers = Buffers(n, moments, device)
        name = f"adam, {'fp32' if moments == FP32 else 'bf16'} moments"
        for block, warps in product((512, 1024, 2048, 4096), (4, 8, 16)):
            config = AdamConfig(block=block, num_warps=warps)
            ms = median_ms(lambda b=buffers, c=config: b.adam(backend="triton", config=c), device)
            yield {"operation": name, "knobs": str(config), "ms": ms}
    for block, programs, stages in product((4096, 8192), (2, 4, 8), (2, 4)):
        config = GradientNormConfig(block=block, programs_per_multiprocessor=programs, num_stages=stages)
        ms = median_ms(lambda b=buffers, c=config: gradient_norm([b.gradient], backend="triton", config=c), device)
        yield {"operation": "norm", "knobs": str(config), "ms": ms}


def copy_rate(nbytes: int, device: torch.device) -> float:
    """Bytes read plus bytes written a second."""
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / (median_ms(lambda: target.copy_(source), device) / 1e3)


def median_ms(function: Callable[[], object], device: torch.device, repeats: int = 11) -> float:
    """Median time of a call after two warm-up calls."""
    if device.type != "cuda":
        started = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - started)
    times: list[Tensor | float] = []
    for number in range(2 + repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        if number >= 2:
            times.append(begin.elapsed_time(end))
    return torch.tensor(times).median().item()


HEAD = "| operation | parameters | moments | floor ms | ours ms | of floor | torch ms |\n|---|--:|---|--:|--:|--:|--:|"


def line(row: Row) -> str:
    """A line of the table."""
    theirs = "" if row.torch is None else f"{row.torch:.2f}"
    return (
        f"| {row.operation} | {row.parameters / 1e9:.1f} B | {row.moments} | {row.floor:.2f} | {row.ours:.2f} "
        f"| {row.floor / row.ours:.0%} | {theirs} |"
    )


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for optimizer_step.json")
    parser.add_argument("--tune", action="store_true", help="also time other launch knobs")
    parser.add_argument("--dry-run", action="store_true", help="small sizes, on whatever device there is")
    options = parser.parse_args()
    if not options.dry_run and (options.out is None or not torch.cuda.is_available()):
        parser.error("--out and a GPU are needed, or --dry-run")

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    require_backend("triton", device)
    rate = copy_rate(1 << (20 if options.dry_run else 31), device)
    facts = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "copy rate": f"{rate / 1e12:.2f} TB/s",
        "versions": f"ckptbridge {ckptbridge.__version__}, torch {torch.__version__}, triton {triton.__version__}, "
        f"Python {platform.python_version()}",
        "command": " ".join(["python", "benchmarks/optimizer_step.py", *sys.argv[1:]]),
    }
    print("\n".join(f"{key}: {value}" for key, value in facts.items()), HEAD, sep="\n", flush=True)
    rows = list[Row]()
    for n, moments in product(DRY_SIZES if options.dry_run else REAL_ADAM, (FP32, BF16)):
        try:
            for row in measure(n, moments, device, rate):
                print(line(row), flush=True)
                rows.append(row)
        except torch.cuda.OutOfMemoryError:
            print(f"| {n / 1e9:.1f} B does not fit |", flush=True)
    tuned = list[dict[str, str | float]]()
    if options.tune:
        for found in tune(DRY_SIZES[0] if options.dry_run else REAL_ADAM[0], device):
            print(found, flush=True)
            tuned.append(found)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        numbers = facts | {"rows": [asdict(row) for row in rows]} | ({"tuned": tuned} if tuned else {})
        (options.out / "optimizer_step.json").write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
