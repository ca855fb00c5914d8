"""A training step of ours beside those of megatron-core with Transformer Engine and of transformers, on one GPU.

    python benchmarks/train_step.py --all --out benchmarks/results/train-step.jsonl --budget 540
    python benchmarks/train_step.py --program ours --slice qwen3-30b-a3b
    python benchmarks/train_step.py --table benchmarks/results/train-step.jsonl --into docs/performance.md \\
        --picture docs/pictures/train-step.png

Every program takes the same steps on the same slice (`slices.py`): one micro-batch of 16,384 random tokens, random
weights, gradients clipped at norm 1, Adam. Each runs in a process of its own. A line of JSON is written as soon as a
program is timed; what a file has already is not run again, so a run that was cut off is continued by the same command.
`--slice tiny` needs no GPU and shows that the programs run, not how fast.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import command_line, put_between_marks, versions
from peers.program import Options, Program
from slices import PEAK_TFLOPS, SLICES, TINY, Slice
from torch import Tensor

PROGRAMS: dict[str, dict[str, Any]] = {
    "floor": {},
    "ours": {},
    "ours, selective recompute": {"recompute": "selective"},
    "ours, bf16 moments": {"moments": torch.bfloat16},
    "ours, bf16 moments, selective recompute": {"moments": torch.bfloat16, "recompute": "selective"},
    "ours, norm in products": {"norm_in_products": True},
    "ours, no graph": {"graph": False},
    "ours, transformer_engine": {"graph": False, "backend": "transformer_engine"},
    "megatron-core": {},
    "megatron-core, bf16 moments": {"moments": torch.bfloat16},
    "transformers": {},
}
"""Name -> what it is asked for beside the usual."""
COMPARED = ("floor", "ours", "megatron-core", "ours, bf16 moments", "transformers")
"""What --all runs unless it is told."""


@dataclass(frozen=True, slots=True)
class Timed:
    """Milliseconds of one call, a median, and the losses that the calls gave."""

    ms: float
    first_loss: float
    last_loss: float


def run(name: str, slice_: Slice, device: torch.device, times: int) -> dict[str, Any]:
    """Build a program, time it, and describe it as a line of the result file."""
    started = time.perf_counter()
    if name == "floor":
        return floor_row(slice_, device)
    program = built(name, slice_, device)
    built_seconds = time.perf_counter() - started
    building = memory(device)
    whole = timed(program.step, times, device)
    stepping = memory(device)
    planned = {"planned_gib": program.planned_gib} if program.planned_gib else {}
    description = program.description
    alone = timed(program.forward_backward, times, device)
    if not math.isfinite(whole.last_loss):
        raise RuntimeError(f"the loss after the last step is {whole.last_loss}")
    return {
        "program": name,
        **speeds(slice_, device, alone.ms, whole.ms),
        "parameters": program.parameters,
        "loss": [round(loss, 4) for loss in (whole.first_loss, whole.last_loss)],
        "peak_gib": round(max(building[0], stepping[0]), 2),
        "steps_gib": round(stepping[0], 2),
        "reserved_gib": round(max(building[1], stepping[1]), 2),
        **planned,
        "built_s": round(built_seconds, 1),
        "all_s": round(time.perf_counter() - started, 1),
        "description": description,
        **versions(),
    }


def floor_row(slice_: Slice, device: torch.device) -> dict[str, Any]:
    """The least that the slice's products and the optimizer's memory traffic take on this GPU."""
    from peers.floor import floor_ms

    if device.type != "cuda":
        raise ValueError(f"the floor is measured on a GPU, not on {device}")
    alone, whole, parameters = floor_ms(slice_, device)
    described = "dense products and cuDNN attention alone, 30 bytes a parameter at the rate of a copy"
    told = {"parameters": parameters, "description": described, **versions()}
    return {"program": "floor", **speeds(slice_, device, alone, whole), **told}


def speeds(slice_: Slice, device: torch.device, alone_ms: float, whole_ms: float) -> dict[str, Any]:
    """Where it ran and how fast."""
    return {
        "slice": slice_.name,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "fb_ms": round(alone_ms, 3),
        "step_ms": round(whole_ms, 3),
        "fb_tflops": round(slice_.flops() / alone_ms / 1e9, 1),
        "step_tflops": round(slice_.flops() / whole_ms / 1e9, 1),
        "tokens_per_s": round(slice_.tokens / whole_ms * 1e3),
    }


def memory(device: torch.device) -> tuple[float, float]:
    """GiB that were in use at most since the last call, and that the allocator held at most for it."""
    if device.type != "cuda":
        return 0.0, 0.0
    found = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return found


def built(name: str, slice_: Slice, device: torch.device) -> Program:
    """The program of a name. Only its own libraries are imported."""
    options = Options(device=device, **PROGRAMS[name])
    match name.split(",")[0]:
        case "ours":
            from peers.ours import Ours

            return Ours(slice_, options)
        case "megatron-core":
            from peers.megatron import Megatron

            return Megatron(slice_, options)
        case _:
            from peers.transformers_model import Transformers

            return Transformers(slice_, options)


def timed(call: Callable[[], Tensor], times: int, device: torch.device, warm_up: int = 4) -> Timed:
    """Time a call on the device's own clock, each call by itself; kernels compile and graphs are captured before."""
    first = call().item()
    for _ in range(warm_up - 1):
        last = call()
    taken = []
    for _ in range(times):
        if device.type == "cuda":
            torch.cuda.synchronize()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            last = call()
            end.record()
            torch.cuda.synchronize()
            taken.append(start.elapsed_time(end))
        else:
            started = time.perf_counter()
            last = call()
            taken.append((time.perf_counter() - started) * 1e3)
    return Timed(statistics.median(taken), first, last.item())


def run_all(options: argparse.Namespace) -> None:
    """Every program on every slice, each in a process of its own, until the budget is spent."""
    started = time.perf_counter()
    done = {(row["program"], row["slice"]) for row in rows_of(options.out) if "error" not in row}
    longest = 0.0
    for slice_name in options.slices or SLICES:
        for name in options.programs or COMPARED:
            if (name, slice_name) in done:
                continue
            left = options.budget - (time.perf_counter() - started)
            if left < max(longest, options.least_left):
                print(f"{left:.0f} s left: {name} on {slice_name} and what follows is not started", flush=True)
                return
            began = time.perf_counter()
            row = run_apart(name, slice_name, left, options)
            longest = max(longest, time.perf_counter() - began)
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(sentence(row), flush=True)


def run_apart(name: str, slice_name: str, seconds: float, options: argparse.Namespace) -> dict[str, Any]:
    """One program in a new process; what went wrong there becomes the row's `error`."""
    command = [sys.executable, __file__, "--program", name, "--slice", slice_name, "--times", str(options.times)]
    failed: dict[str, Any] = {"program": name, "slice": slice_name, **versions()}
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return failed | {"error": f"not done after {seconds:.0f} s"}
    for line in reversed(process.stdout.splitlines()):
        if line.startswith("{"):
            return json.loads(line) | {"command": command_line("train_step.py")}
    return failed | {"error": (process.stderr or process.stdout).strip()[-1500:]}


def run_one(options: argparse.Namespace) -> None:
    """One program in this process; its row is printed, or an error's."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    slice_ = TINY if options.slice == TINY.name else SLICES[options.slice]
    try:
        row = run(options.program, slice_, device, options.times)
    except (RuntimeError, ValueError, ImportError) as error:
        traceback.print_exc()
        where = {"program": options.program, "slice": slice_.name, **versions()}
        row = where | {"error": f"{type(error).__name__}: {str(error)[:600]}"}
    print(json.dumps(row), flush=True)
    # megatron-core's process group would wait for its heartbeat at exit.
    os._exit("error" in row)


def rows_of(file: Path | None) -> list[dict[str, Any]]:
    """What a result file holds."""
    if file is None or not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]


def sentence(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['slice']:<16}{row['program']:<26}{row['error'].splitlines()[-1][:150]}"
    return (
        f"{row['slice']:<16}{row['program']:<26}fb {row['fb_ms']:8.2f} ms {row['fb_tflops']:6.1f} TFLOP/s   "
        f"step {row['step_ms']:8.2f} ms {row['step_tflops']:6.1f} TFLOP/s   {row.get('peak_gib', 0):6.2f} GiB   "
        f"loss {row.get('loss', '')}   {row.get('all_s', 0):.0f} s"
    )


_HEAD = (
    "| slice | program | fb ms | fb TFLOP/s | MFU | step ms | step TFLOP/s | MFU | tokens/s | peak GiB |\n"
    "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"
)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown, by slice, with the figures to reach below each slice. The last row of a name counts."""
    latest = {(row["slice"], row["program"]): row for row in rows if "error" not in row}
    lines = [_HEAD]
    for slice_ in SLICES.values():
        mine = [row for (slice_name, _), row in latest.items() if slice_name == slice_.name]
        lines += [_line(row) for row in sorted(mine, key=lambda row: [*PROGRAMS].index(row["program"]))]
        if mine:
            fb, step, (fp32, bf16) = slice_.forward_backward, slice_.step, slice_.peak_gib
            lines.append(
                f"| | *at least / aim* | | *{fb.least:g} / {fb.aim:g}* | | | *{step.least:g} / {step.aim:g}* | | | "
                f"*{fp32:g}, with bf16 moments {bf16:g}* |"
            )
    return "\n".join([*lines, "", *_provenance(list(latest.values()))])


def _line(row: dict[str, Any]) -> str:
    fb, step = row["fb_tflops"], row["step_tflops"]
    peak = f"{row['peak_gib']:.1f}" if "peak_gib" in row else ""
    planned = f" (planned {row['planned_gib']:.1f})" if "planned_gib" in row else ""
    return (
        f"| {row['slice']} | {row['program']} | {row['fb_ms']:.1f} | {fb:.0f} | {fb / PEAK_TFLOPS:.1%} "
        f"| {row['step_ms']:.1f} | {step:.0f} | {step / PEAK_TFLOPS:.1%} | {row['tokens_per_s']:,} | {peak}{planned} |"
    )


def _provenance(rows: list[dict[str, Any]]) -> Iterator[str]:
    for name in dict.fromkeys(row["device"] for row in rows):
        dates = sorted({row["date"] for row in rows if row["device"] == name})
        yield f"- {name}, {' and '.join(dates)}"
    for text in dict.fromkeys(f"{row['program']}: {row['description']}, torch {row['torch']}" for row in rows):
        yield f"- {text}"


def draw(rows: list[dict[str, Any]], picture: Path) -> None:
    """Bars of TFLOP/s: forward and backward on the left, whole steps on the right; a dash where "at least" is."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    latest = {(row["slice"], row["program"]): row for row in rows if "error" not in row}
    programs = [name for name in PROGRAMS if any(program == name for _, program in latest)]
    figure, sides = pyplot.subplots(1, 2, figsize=(13, 4.4), dpi=130, layout="constrained", sharey=True)
    width = 0.85 / max(1, len(programs))
    for axes, field, title in zip(sides, ("fb", "step"), ("forward and backward", "whole step"), strict=True):
        for place, program in enumerate(programs):
            heights = [latest.get((name, program), {}).get(f"{field}_tflops", 0) for name in SLICES]
            left = [slot + (place - (len(programs) - 1) / 2) * width for slot in range(len(SLICES))]
            colour = "lightgrey" if program == "floor" else None
            axes.bar(left, heights, width, label=program, color=colour)
        for slot, slice_ in enumerate(SLICES.values()):
            least = (slice_.forward_backward if field == "fb" else slice_.step).least
            axes.plot([slot - 0.45, slot + 0.45], [least, least], color="black", linestyle=":", linewidth=1.2)
        axes.set(title=title)
        axes.set_xticks(range(len(SLICES)), list(SLICES))
        axes.grid(axis="y", alpha=0.3)
    sides[0].set(ylabel="model TFLOP/s")
    figure.legend(*sides[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(programs), frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--all", action="store_true", help="every program on every slice, each in a process")
    what.add_argument("--program", choices=PROGRAMS, help="this one, in this process")
    what.add_argument("--table", type=Path, help="print a result file as markdown")
    parser.add_argument("--into", type=Path, help="of --table: put it between the marks of this markdown file instead")
    parser.add_argument("--picture", type=Path, help="of --table: draw it too")
    parser.add_argument("--slice", choices=[*SLICES, TINY.name], help="of --program")
    parser.add_argument("--slices", nargs="+", choices=[*SLICES, TINY.name], help="of --all")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, help="of --all")
    parser.add_argument("--out", type=Path, help="of --all: a file of JSON lines, added to")
    parser.add_argument("--budget", type=float, default=540, help="seconds after which --all starts nothing more")
    parser.add_argument("--least-left", type=float, default=60, help="seconds that must be left to start a program")
    parser.add_argument("--times", type=int, default=8, help="timed calls of each kind")
    options = parser.parse_args()
    if options.table:
        text = table(rows_of(options.table))
        print(text) if options.into is None else put_between_marks(options.into, "train-step", text)
        if options.picture:
            draw(rows_of(options.table), options.picture)
    elif options.program:
        if options.slice is None:
            parser.error("--program needs --slice")
        run_one(options)
    else:
        if options.out is None:
            parser.error("--all needs --out")
        run_all(options)


if __name__ == "__main__":
    main()
