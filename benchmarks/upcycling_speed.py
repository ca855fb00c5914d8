"""How fast `upcycle` writes a mixture, and in how much memory, beside the copy of the same bytes in the same run.

    python benchmarks/upcycling_speed.py                             # 1.2 GB Llama -> 8 experts, 6 GB written
    python benchmarks/upcycling_speed.py --folder /data --write

Each command is a whole process without the report (`--no-probe`), which runs the model; the report's own time and
memory stand in a row of their own. The copy is `cp -r` of the first mixture and `sync`; both take turns.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measuring import (
    RESULTS,
    Measured,
    command_line,
    machine_in_words,
    measure,
    model_of,
    versions,
    write_random_model,
    write_result,
)
from torch import Tensor

from ckptbridge.converters.tensors import Zeros

CASES = {
    "E8G1T2": ["--num-experts", "8", "--topk", "2"],
    "E8G8T8": ["--num-experts", "64", "--topk", "8", "--granularity", "8"],
    "E8G1T2 to mcore, EP 4": ["--num-experts", "8", "--topk", "2", "--to", "mcore", "--ep", "4"],
    "E4G4T4, permuted": ["--num-experts", "16", "--topk", "4", "--granularity", "4", "--permute"],
    "E8G1T2, drop 0.5": ["--num-experts", "8", "--topk", "2", "--method", "drop"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--write", action="store_true", help=f"write the result into {RESULTS.name}/")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as work:
        result = run(options, Path(work))
    if options.write:
        write_result("upcycling-speed.json", result)


def run(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    dense, out = work / "dense", work / "out"
    read = write_random_model(*model_of("llama", options.gb), dense, draw=_initial)
    print(f"a Llama of {read / 1e9:.2f} GB; whole processes, medians of {options.runs}")
    print(f"{'':<26}{'written GB':>11}{'s':>8}{'copy s':>8}{'ratio':>7}{'CPU s':>7}{'peak GiB':>10}")
    rows: dict[str, Any] = {}
    for name in options.only:
        command = [sys.executable, "-m", "ckptbridge", "upcycle", str(dense), str(out), *CASES[name], "--quiet"]
        rows[name] = row = case(name, [*command, "--no-probe"], options.runs, work)
        if name == "E8G1T2":
            reported = measure(command)
            row["with_report"] = {"seconds": reported.seconds, "peak_gib": reported.peak_gib}
            print(f"{'  with the report':<26}{'':>11}{reported.seconds:>8.1f}{'':>22}{reported.peak_gib:>10.2f}")
            shutil.rmtree(out)
    return {
        **versions(),
        "machine": machine_in_words(),
        "command": command_line("upcycling_speed.py"),
        "dense_nbytes": read,
        "runs": rows,
    }


def _initial(tensor: Zeros, generator: torch.Generator) -> Tensor:
    """Weights as a model begins with: of size 1, rounding would grow from layer to layer."""
    return torch.randn(tensor.shape, generator=generator, dtype=torch.bfloat16).mul_(0.02)


def case(name: str, command: list[str], runs: int, work: Path) -> dict[str, Any]:
    """One way to upcycle, and the copy of what it wrote, in turns."""
    out, kept, copied = work / "out", work / "kept", work / "copied"
    measure(command)
    out.rename(kept)
    written = sum(file.stat().st_size for file in kept.rglob("*") if file.is_file())
    made: list[Measured] = []
    copies: list[Measured] = []
    for _ in range(runs):
        os.sync()
        made.append(measure(command))
        shutil.rmtree(out)
        os.sync()
        copies.append(measure(["sh", "-c", f"cp -r {kept} {copied} && sync"]))
        shutil.rmtree(copied)
    shutil.rmtree(kept)
    seconds, copy = (statistics.median(one.seconds for one in each) for each in (made, copies))
    processor, peak = statistics.median(one.processor_seconds for one in made), max(one.peak_gib for one in made)
    print(
        f"{name:<26}{written / 1e9:>11.2f}{seconds:>8.1f}{copy:>8.1f}{seconds / copy:>7.2f}"
        f"{processor:>7.1f}{peak:>10.2f}",
        flush=True,
    )
    return {
        "written_nbytes": written,
        "seconds": [one.seconds for one in made],
        "copy_seconds": [one.seconds for one in copies],
        "ratio": seconds / copy,
        "processor_seconds": processor,
        "peak_gib": peak,
    }


if __name__ == "__main__":
    main()
