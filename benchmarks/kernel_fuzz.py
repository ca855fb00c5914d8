"""Run every kernel on thousands of random shapes and compare with fp64.

    PYTHONPATH=. python benchmarks/kernel_fuzz.py --n 1000                      on a GPU, or interpreted on a CPU
    PYTHONPATH=. python benchmarks/kernel_fuzz.py --only experts --first 17 --n 1     one case again

A case is drawn from its number: ragged rows, experts that nobody chose, one that takes all, sizes beside powers of two,
addresses that no wide load may touch, random launch knobs of the grouped products. Memory that a kernel has to write is
poisoned before, and bounds are those of the tests (tests/kernels). Interpreted, each access is checked as well: none
outside a launch's tensors, no race between programs. Exits with 1 if a case is off, and names it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from measuring import command_line, machine_in_words, versions

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported, which decides how they run

from tests.kernels.checked_memory import check_memory
from tests.kernels.drawn import DRAWN, drawn

MOST_FAILURES = 20
"""Of one operation, which then is left."""


def run(operation: str, numbers: range, largest: float, device: torch.device) -> dict[str, Any]:
    """How many cases of an operation were right, and which were not."""
    started, failures, done = time.perf_counter(), [], 0
    for number in numbers:
        case, check = drawn(operation, number, largest)
        try:
            check(device)
        except Exception as error:  # whatever a kernel raises is a finding, as a wrong number is
            failures.append({"number": number, "case": case, "error": f"{type(error).__name__}: {error}"})
            print(f"{operation} {number}: {case}\n  {failures[-1]['error']}", flush=True)
        done += 1
        if len(failures) == MOST_FAILURES:
            break
    seconds = round(time.perf_counter() - started, 1)
    print(f"{operation}: {done - len(failures)} of {done} cases right, {seconds} s", flush=True)
    return {"cases": done, "seconds": seconds, "failures": failures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=200, help="cases of each operation")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", nargs="+", choices=DRAWN, default=list(DRAWN), help="operations")
    parser.add_argument("--largest", type=float, default=1.0, help="times the usual largest sizes")
    parser.add_argument("--out", type=Path, help="write the result here, after every operation")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="overflow encountered in exp")  # numpy's word on exp(88) in fp32
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        check_memory()
    result: dict[str, Any] = {
        **versions(),
        "command": command_line("kernel_fuzz.py"),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"interpreted, {machine_in_words()}",
        "operations": {},
    }
    for operation in options.only:
        numbers = range(options.first, options.first + options.n)
        result["operations"][operation] = run(operation, numbers, options.largest, device)
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    found = sum(len(made["failures"]) for made in result["operations"].values())
    print(f"{sum(made['cases'] for made in result['operations'].values())} cases, {found} off")
    sys.exit(int(found > 0))


if __name__ == "__main__":
    main()
