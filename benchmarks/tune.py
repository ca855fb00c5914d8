"""Find the fastest launch knobs of the grouped matrix products on this GPU.

    PYTHONPATH=. python benchmarks/tune.py --seconds 300 --write kernels/grouped_configs.json     everything
    PYTHONPATH=. python benchmarks/tune.py --models qwen3-30b-a3b --products fc1,fc1_wgrad        some of it
    PYTHONPATH=. python benchmarks/tune.py --engine gluon     those variants alone, and the table's knobs beside them
    TRITON_INTERPRET=1 PYTHONPATH=. python benchmarks/tune.py                                     tiny sizes, on a CPU

All variants are compiled first, in processes of their own: a variant may fail, hang or kill its compiler and costs
that variant only. Each is checked against fp64 on a sample of rows and against torch._grouped_mm everywhere. Then all
take turns at being timed (medians of CUDA-event times; all operands are far larger than the cache), for a GPU clocks
lower as it gets hot. In a second round the winner takes turns with torch._grouped_mm and with one dense product of the
same number of operations.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch
from grouped_products import DTYPE, MODELS, TINY, Job, Operands, jobs_of, operands_of
from torch import Tensor
from worker_pool import WorkerPool

from ckptbridge.kernels import grouped_matmul as matmul
from ckptbridge.kernels import grouped_weight_gradient as gradient
from ckptbridge.kernels.grouped_config import GroupedConfig, config_for

Name = TypeVar("Name")

TURNS = 4  # at being timed
SECONDS_A_VARIANT = 90  # to compile; the first one in a process also loads torch


def variants_of(job: Job, engine: str, most: int | None, device: torch.device) -> list[GroupedConfig]:
    """What is tried: all variants, or the likeliest of one engine and what the table has for `device`."""
    if not engine:
        return _all_variants_of(job)[:most]
    variants = [variant for variant in _all_variants_of(job) if variant.engine == engine]
    return list(dict.fromkeys([config_for(job.product, device), *variants[:most]]))


def _all_variants_of(job: Job) -> list[GroupedConfig]:
    parts = 4 if job.is_gradient else 2  # fp32 tiles are stored in quarters, to leave room for more stages
    wide = GroupedConfig(block_rows=128, block_columns=256, num_stages=3, parts=parts)
    high = replace(wide, block_rows=256, block_columns=128)
    square = replace(wide, block_columns=128)
    variants = [
        replace(wide, num_stages=4),
        wide,
        replace(wide, group=16),
        replace(wide, group=4),
        replace(wide, block_depth=128, num_stages=2),
        replace(wide, num_stages=4, flatten=False),
        replace(high, num_stages=4),
        replace(square, num_warps=4, programs=2),
        replace(square, num_stages=4, parts=1),
    ]
    if job.gathered in ("d", "x"):
        # A row's index is a load ahead of the row's: half of the stages go into that.
        variants += [replace(wide, num_stages=5), replace(high, num_stages=5), replace(square, num_stages=6)]
        return variants
    if job.gathered:
        return variants
    roles = replace(wide, num_stages=4, engine="gluon")
    variants += [replace(roles, lead=1), replace(roles, group=16, lead=1), roles, replace(roles, lead=2)]
    variants += [replace(roles, group=4, lead=1), replace(roles, num_stages=3)]
    return [*variants, replace(roles, block_rows=256, block_columns=128, lead=1)]


def launch(job: Job, o: Operands, config: GroupedConfig, *, accumulate: bool = False) -> None:
    """Run the Triton kernel as the operation would."""
    if job.is_gradient:
        d_rows = o.tokens_R if job.gathered == "d" else None
        x_rows = o.tokens_R if job.gathered == "x" else None
        gradient.launch_weight_gradient(
            o.first, o.second, o.ends_E, d_rows, x_rows, o.out, accumulate=accumulate, config=config
        )
    else:
        rows = o.tokens_R if job.gathered else None
        matmul.launch_matmul(o.first, o.second, o.ends_E, rows, o.out, transposed=job.transposed, config=config)


def compile_variant(job: Job, config: GroupedConfig) -> str:
    """Compile without running, into the cache that all processes share. Returns a word on registers and memory."""
    o = operands_of(job, "meta")
    if config.engine == "gluon":
        return _compile_roles(job, o, config)
    if job.is_gradient:
        d_rows = o.tokens_R if job.gathered == "d" else None
        x_rows = o.tokens_R if job.gathered == "x" else None
        kernel = gradient._weight_gradient_kernel
        arguments, knobs = gradient.weight_gradient_arguments(
            o.first, o.second, o.ends_E, d_rows, x_rows, o.out, None, accumulate=False, config=config
        )
    else:
        rows = o.tokens_R if job.gathered else None
        kernel = matmul._matmul_kernel
        table = torch.empty(8, 4, dtype=torch.int32, device="meta")
        arguments, knobs = matmul.matmul_arguments(
            o.first, o.second, rows, o.out, table, transposed=job.transposed, config=config
        )
    compiled = kernel.warmup(*arguments, grid=(1,), **knobs)
    return f"{compiled.metadata.shared / 1024:.0f} KiB"


def _compile_roles(job: Job, o: Operands, config: GroupedConfig) -> str:
    from ckptbridge.kernels import grouped_hopper as hopper  # here: a Triton without Gluon runs all other variants

    if job.is_gradient:
        kernel = hopper.weight_gradient_kernel
        arguments, knobs = hopper.weight_gradient_arguments(
            o.first, o.second, o.ends_E, o.out, None, accumulate=False, config=config
        )
    else:
        kernel = hopper.matmul_kernel
        table = torch.empty(8, 4, dtype=torch.int32, device="meta")
        arguments, knobs = hopper.matmul_arguments(
            o.first, o.second, o.out, table, transposed=job.transposed, config=config
        )
    compiled = kernel.warmup(*arguments, grid=(1,), **knobs)
    return f"{compiled.metadata.shared / 1024:.0f} KiB"


# Checking and timing


def torch_product(job: Job, o: Operands) -> Callable[[], Tensor]:
    """torch._grouped_mm of operands that are gathered beforehand."""
    first = o.first.index_select(0, o.tokens_R) if job.gathered in ("a", "d") else o.first
    second = o.second.index_select(0, o.tokens_R) if job.gathered == "x" else o.second
    if job.is_gradient:
        return lambda: torch._grouped_mm(first.t(), second, offs=o.ends_E)
    weight = second.transpose(1, 2) if job.transposed else second
    return lambda: torch._grouped_mm(first, weight, offs=o.ends_E)


def dense_product(job: Job, o: Operands) -> Callable[[], Tensor]:
    """One dense product of as many operations."""
    device = o.first.device
    if job.is_gradient:
        d, x = (torch.randn(job.R, width, dtype=DTYPE, device=device) for width in (job.width, job.depth))
        out = torch.empty(job.width, job.depth, dtype=DTYPE, device=device)
        return lambda: torch.mm(d.t(), x, out=out)
    a = torch.randn(job.R, job.depth, dtype=DTYPE, device=device)
    weight = o.second[0].t() if job.transposed else o.second[0]
    return lambda: torch.mm(a, weight, out=o.out)


def exact_sample(job: Job, o: Operands) -> Iterator[tuple[Tensor, Tensor]]:
    """(what is there, what it should be in fp64) for a few rows around every expert's ends, or columns of some."""
    begin = 0
    for expert, end in enumerate(o.ends_E.tolist()):
        if job.is_gradient:
            if expert % max(1, job.model.E // 8) == 0:
                rows = slice(begin, end)
                d = o.first[o.tokens_R[rows]] if job.gathered == "d" else o.first[rows]
                x = o.second[o.tokens_R[rows]] if job.gathered == "x" else o.second[rows]
                yield o.out[expert, :, -40:], d.double().t() @ x[:, -40:].double()
        elif end > begin:
            rows = torch.tensor(sorted({begin, end - 1, (begin + end) // 2}), device=o.out.device)
            a = o.first[o.tokens_R[rows] if job.gathered else rows].double()
            weight = o.second[expert].t() if job.transposed else o.second[expert]
            yield o.out[rows], a @ weight.double()
        begin = end


def error_of(job: Job, o: Operands, whole: Tensor) -> str | None:
    """What is wrong with o.out, if anything: `whole` is torch's, rounded to bf16."""
    far = relative_error(o.out, whole)
    if not far < 5e-3:
        return f"differs from torch._grouped_mm by {far:.1e}"
    for actual, expected in exact_sample(job, o):
        limit = 1e-5 if job.is_gradient else 5e-3
        if not (far := relative_error(actual, expected)) < limit:
            return f"differs from fp64 by {far:.1e}"
    return None


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, a block at a time: the largest are 6 GiB."""
    error = torch.zeros((), dtype=torch.float64, device=actual.device)
    norm = error.clone()
    for a, b in zip(actual.split(max(1, len(actual) // 16)), expected.split(max(1, len(actual) // 16)), strict=True):
        wide = torch.promote_types(b.dtype, torch.float32)
        error += (a.to(wide) - b.to(wide)).square().sum(dtype=torch.float64)
        norm += b.to(wide).square().sum(dtype=torch.float64)
    return (error / norm).sqrt().item() if norm > 0 else error.sqrt().item()


def seconds_of(functions: dict[Name, Callable[[], object]], device: torch.device, budget: float) -> dict[Name, float]:
    """Median of the times of single calls of each, over about `budget` seconds for each, in turns."""
    if device.type != "cuda":
        return {name: _seconds_of_call(function) for name, function in functions.items()}
    times: dict[Name, list[float]] = {name: [] for name in functions}
    for turn in range(TURNS + 1):
        for name, function in functions.items():
            estimate = min(times[name], default=budget)
            taken = _timed(function, min(10, max(2, int(budget / TURNS / estimate))))
            times[name] = taken if turn == 0 else times[name] + taken  # the first turn warms up
        if turn == 1:
            times = {name: taken[2:] for name, taken in times.items()}
    return {name: statistics.median(taken) for name, taken in times.items()}


def _seconds_of_call(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _timed(function: Callable[[], object], count: int) -> list[float]:
    """Seconds of each of `count` calls in a row."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)]


def short(config: GroupedConfig) -> str:
    if config.engine == "gluon":
        return (
            f"{config.block_rows}x{config.block_columns}x{config.block_depth} gluon s{config.num_stages} "
            f"g{config.group} lead {config.lead}"
        )
    marks = ("" if config.flatten else " unflattened") + ("" if config.descriptor_stores else " plain stores")
    programs = f" x{config.programs}" if config.programs > 1 else ""
    return (
        f"{config.block_rows}x{config.block_columns}x{config.block_depth} w{config.num_warps} s{config.num_stages} "
        f"g{config.group} p{config.parts}{programs}{marks}"
    )


def tune(job: Job, device: torch.device, outcomes: list[tuple[GroupedConfig, Future]], budget: float) -> dict | None:
    """Check and time the variants of a job, print what came out, and return the table entry of the winner."""
    o = operands_of(job, device)
    reference = torch_product(job, o)
    whole = reference()
    working: dict[GroupedConfig, Callable[[], object]] = {}
    for config, outcome in outcomes:
        worked, text = outcome.result()
        failure = None if worked else text
        if worked:
            o.out.fill_(torch.nan)
            try:
                launch(job, o, config)
                failure = error_of(job, o, whole)
            except Exception as error:  # a variant that needs more than the GPU has
                failure = f"{type(error).__name__}: {str(error)[:80]}"
        if failure:
            print(f"    {short(config):64s} failed: {failure}", flush=True)
            continue
        working[config] = partial(launch, job, o, config)
    if not working:
        print(f"{job.model.name} {job.name}: no variant worked", flush=True)
        return None
    del whole
    seconds = seconds_of(working, device, budget)
    for config in working:
        print(f"    {short(config):64s} {job.flops / seconds[config] / 1e12:7.1f}", flush=True)
    best = min(seconds, key=lambda config: seconds[config])
    ours = {config.engine: config for config in sorted(seconds, key=lambda config: -seconds[config])}
    rivals: dict[str, Callable[[], object]] = {engine: working[config] for engine, config in ours.items()}
    if job.is_gradient:
        rivals["accumulating"] = partial(launch, job, o, best, accumulate=True)
    rivals["torch._grouped_mm"] = reference
    rivals["dense"] = dense_product(job, o)
    final = {name: job.flops / taken / 1e12 for name, taken in seconds_of(rivals, device, budget * 2).items()}
    winner = ours[max(ours, key=lambda engine: final[engine])]  # of the two that took turns once more
    line = f"{job.model.name} {job.name}: {short(winner)} | " + ", ".join(
        f"{name} {f:.0f}" for name, f in final.items()
    )
    if job.gathered:
        source = o.second if job.gathered == "x" else o.first
        gather = {"": partial(source.index_select, 0, o.tokens_R)}
        line += f", torch's gather {seconds_of(gather, device, budget / 4)[''] * 1e3:.2f} ms"
    print(f"{line} TFLOP/s", flush=True)
    return {
        "product": job.product._asdict(),
        "config": asdict(winner),
        "teraflops": round(final[winner.engine], 1),
        "model": job.model.name,
    }


def write(path: Path, capability: str, entries: list[dict]) -> None:
    """Put the entries into the table, in place of those of the same products."""
    table = json.loads(path.read_text()) if path.exists() else {}
    latest = {json.dumps(entry["product"]): entry for entry in table.get(capability, []) + entries}
    table[capability] = sorted(latest.values(), key=lambda entry: (entry["product"]["kind"], entry["model"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="", help="names separated by commas; all if left out")
    parser.add_argument("--products", default="", help="names separated by commas; all if left out")
    parser.add_argument("--seconds", type=float, default=300, help="stop before a product that would start later")
    parser.add_argument("--measure", type=float, default=0.08, help="seconds of measuring a variant")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="compilers side by side")
    parser.add_argument("--engine", default="", choices=["triton", "gluon"], help="its variants and the table's alone")
    parser.add_argument("--most", type=int, help="try so many variants of a product, the likeliest")
    parser.add_argument("--write", type=Path, help="the table to put winners into, in place of what it had for them")
    options = parser.parse_args()
    started = time.monotonic()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    models = MODELS if device.type == "cuda" else TINY
    wanted = [set(filter(None, names.split(","))) for names in (options.models, options.products)]
    jobs = [job for model in models if not wanted[0] or model.name in wanted[0] for job in jobs_of(model)]
    # A product of each model before the next product: what is done when the time is up says something on all.
    names = [job.name for job in jobs_of(models[0])]
    jobs = sorted(
        (job for job in jobs if not wanted[1] or job.name in wanted[1]), key=lambda job: names.index(job.name)
    )
    capability, pool = "cpu", None
    if device.type == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {len(jobs)} products", flush=True)
        pool = WorkerPool(compile_variant, options.processes, SECONDS_A_VARIANT)
    entries = []
    try:
        outcomes = [
            [(config, _outcome(pool, job, config)) for config in variants_of(job, options.engine, options.most, device)]
            for job in jobs
        ]
        for i, (job, outcome) in enumerate(zip(jobs, outcomes, strict=True)):
            if time.monotonic() - started > options.seconds:
                print(f"time is up: {', '.join(f'{job.model.name} {job.name}' for job in jobs[i:])} not tried")
                break
            entry = tune(job, device, outcome, options.measure) if outcome else None
            entries += [entry] if entry else []
            if options.write and entries:
                write(options.write, capability, entries)
    finally:
        if pool:
            pool.stop()


def _outcome(pool: WorkerPool | None, job: Job, config: GroupedConfig) -> Future[tuple[bool, str]]:
    if pool:
        return pool.submit(job, config)
    interpreted: Future[tuple[bool, str]] = Future()
    interpreted.set_result((True, ""))
    return interpreted


if __name__ == "__main__":
    main()
