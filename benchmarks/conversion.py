"""Wall time and peak memory of converting a random model, beside `cp -r` of the same bytes in the same run.

    python benchmarks/conversion.py                                       # 1.7 GB Llama
    python benchmarks/conversion.py --model mixtral --gb 8 --sync --check

Each command is a whole process, Python's start included. Conversion and copy of one source take turns, `--runs` times
each, and the order changes from turn to turn; the ratio of a turn compares two runs that followed each other, and the
median of these ratios is what counts. The source's pages are in the cache; only one source and one output lie there
at a time. Outputs are removed between runs. With `--sync`, `cp -r` is followed by `sync`, since a conversion syncs its
files. `--check` converts a model of twice the size too, and fails when that takes more memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from measuring import RESULTS, Measured, command_line, measure, model_of, versions, write_random_model, write_result

PEERS: dict[tuple[str, float], dict[str, Any]] = {
    ("llama", 1.7): {
        "name": "Megatron-Bridge 0.6.2 on the same Llama",
        "seconds": 24.0,
        "peak_gib": 2.58,
        "source": "measured before on a machine of this kind, its own conversion and save; not run again here",
    }
}
MOST_PEAK_GIB = 1.0
GROWTH_GIB = 0.1
"""Twice the model has twice the headers, and the allocator is not exact: anything beyond this is no flat memory."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("llama", "mixtral"), default="llama")
    parser.add_argument("--gb", type=float, default=1.7)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--sync", action="store_true")
    parser.add_argument("--check", action="store_true", help="convert twice the size too, and compare the memory")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--write", action="store_true", help=f"write the result into {RESULTS.name}/")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as work:
        result = run(options, Path(work))
    if options.write:
        write_result(f"conversion-{options.model}-{options.gb:g}gb.json", result)
    if not sys.stdout.isatty():
        print(json.dumps(result, indent=1))
    if result.get("flat") is False:
        raise SystemExit("the peak memory is above the bound, or grows with the model")


def program(verb: str, source: Path, target: Path) -> list[str]:
    return [sys.executable, "-m", "ckptbridge", verb, str(source), str(target), "--quiet"]


def run(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    family, config = model_of(options.model, options.gb)
    load = [round(os.getloadavg()[0], 2)]
    hf, mcore, copy, made = (work / name for name in ("hf", "mcore", "copy", "made"))
    nbytes = write_random_model(family, config, hf)
    print(f"{family.architecture}, {config.num_layers} layers, {nbytes / 1e9:.2f} GB bf16, {options.runs} runs each")
    print("command    median s    min    max   GB/s  peak GiB  CPU s    cp s   x cp")
    rows: dict[str, dict[str, Any]] = {}
    for verb, source in (("hf2mcore", hf), ("mcore2hf", mcore)):
        if verb == "mcore2hf":
            measure(program("hf2mcore", hf, mcore))
            shutil.rmtree(hf)
        copying = ["sh", "-c", f"cp -r {source} {copy}" + (" && sync" if options.sync else "")]
        rows[verb] = in_turns(program(verb, source, made), made, copying, copy, options.runs)
        told = rows[verb]
        print(
            f"{verb:<10}{told['median_s']:>9.2f}{min(told['seconds']):>7.2f}{max(told['seconds']):>7.2f}"
            f"{nbytes / 1e9 / told['median_s']:>7.2f}{told['peak_gib']:>10.2f}"
            f"{told['processor_seconds']:>7.2f}{told['copy_median_s']:>8.2f}{told['times_cp']:>7.2f}"
        )
        load.append(round(os.getloadavg()[0], 2))
    shutil.rmtree(mcore)
    result: dict[str, Any] = {
        **versions(),
        "machine": machine(work),
        "load_average": load,
        "command": command_line("conversion.py"),
        "copy": "cp -r" + (" && sync" if options.sync else ""),
        "model": family.architecture,
        "nbytes": nbytes,
        "runs": rows,
    }
    if peer := PEERS.get((options.model, options.gb)):
        ratios = {verb: peer["seconds"] / told["median_s"] for verb, told in rows.items()}
        result["peer"] = {**peer, "times_faster": ratios}
        print(f"{peer['name']}: {peer['seconds']} s, {peer['peak_gib']} GiB ({peer['source']})")
        print(", ".join(f"{verb} is {ratio:.1f} x as fast" for verb, ratio in ratios.items()))
    if options.check:
        peaks = at_twice_the_size(options, work)
        flat = all(
            peak <= MOST_PEAK_GIB and peak <= told["peak_gib"] + GROWTH_GIB
            for peak, told in zip(peaks.values(), rows.values(), strict=True)
        )
        result |= {"peak_gib_at_twice_the_size": peaks, "flat": flat}
        print("peak GiB at twice the size: " + ", ".join(f"{verb} {peak:.2f}" for verb, peak in peaks.items()))
    return result


def in_turns(converting: list[str], made: Path, copying: list[str], copied: Path, runs: int) -> dict[str, Any]:
    """Both commands by turns, after one of each that warms the cache; the order changes from turn to turn."""
    ours: list[Measured] = []
    theirs: list[Measured] = []
    for turn in range(runs + 1):
        both = [(converting, made, ours), (copying, copied, theirs)]
        for command, target, taken in both if turn % 2 else reversed(both):
            os.sync()
            measured = measure(command)
            shutil.rmtree(target)
            if turn:
                taken.append(measured)
    ratios = [one.seconds / copy.seconds for one, copy in zip(ours, theirs, strict=True)]
    return {
        "seconds": [one.seconds for one in ours],
        "copy_seconds": [copy.seconds for copy in theirs],
        "processor_seconds": statistics.median(one.processor_seconds for one in ours),
        "copy_processor_seconds": statistics.median(copy.processor_seconds for copy in theirs),
        "median_s": statistics.median(one.seconds for one in ours),
        "copy_median_s": statistics.median(copy.seconds for copy in theirs),
        "times_cp": statistics.median(ratios),
        "times_cp_of_each_turn": ratios,
        "peak_gib": max(one.peak_gib for one in ours),
    }


def at_twice_the_size(options: argparse.Namespace, work: Path) -> dict[str, float]:
    """The peak memory of both ways, for a model of twice the bytes."""
    hf, mcore, back = (work / f"twice_{name}" for name in ("hf", "mcore", "back"))
    write_random_model(*model_of(options.model, 2 * options.gb), hf)
    there = measure(program("hf2mcore", hf, mcore)).peak_gib
    shutil.rmtree(hf)
    again = measure(program("mcore2hf", mcore, back)).peak_gib
    shutil.rmtree(mcore)
    shutil.rmtree(back)
    return {"hf2mcore": there, "mcore2hf": again}


def machine(work: Path) -> dict[str, Any]:
    """What the numbers were taken on."""
    processor = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in processor.read_text().splitlines() if line.startswith("model name")]
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    within = [mount for mount in mounts if work.resolve().is_relative_to(mount[1])]
    system = max(within, key=lambda mount: len(mount[1]))[2]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": os.cpu_count(),
        "processor": names[0] if names else platform.machine(),
        "memory_gib": round(memory / 2**30, 1),
        "file_system": system,
        "kernel": platform.release().split("-")[0],
    }


if __name__ == "__main__":
    main()
