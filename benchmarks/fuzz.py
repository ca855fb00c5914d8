"""Spoiled checkpoints of every format, any number of them, and what the converter does with each.

    python benchmarks/fuzz.py --n 20000 --write
    python benchmarks/fuzz.py --n 1000000 --seconds 600 --seed 7
    python benchmarks/fuzz.py --show 1234                       # keeps input 1234 in ./fuzz-1234

Every input is opened, described, planned and converted (Hugging Face to Megatron and back) by a process that lives for
many inputs. What was converted is read again by safetensors and torch alone and compared with the spoiled source.
Anything but "converted", "refused" and "storage" is a defect:

    CRASH    an exception that a user would see as a traceback, or the process died
    HANG     more than --hang seconds of processor time
    MEMORY   more than --max-ram and a constant
    ESCAPE   an attempt to write outside the target, or to run something
    WRONG    converted, but not to the tensors that the spoiled source holds
    MESSAGE  a refusal that names no file, or is too long to read

Input i of a seed is always the same, so that a defect can be made again with --show.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
FINE = ("converted", "refused", "storage")
COLUMNS = (*FINE, "CRASH", "HANG", "MEMORY", "ESCAPE", "WRONG", "MESSAGE")
WORKER = "tests.converters.fuzz_worker"
WALL = 12
"""How many times --hang an input may take by the clock: a machine that is shared is slow, not stuck."""


class Lane:
    """Every `step`-th input from `start`, in one worker process after another."""

    def __init__(self, asked: argparse.Namespace, start: int, step: int, scratch: Path) -> None:
        self.asked, self.start, self.step = asked, start, step
        self.scratch, self.progress = scratch, scratch / f"lane{start}"
        self.results: list[dict[str, Any]] = []

    def run(self, until: float) -> None:
        number = self.start
        while number < self.asked.n and time.monotonic() < until:
            number = self._run_worker(number, until)

    def _run_worker(self, number: int, until: float) -> int:
        """Run inputs from `number` until one kills the worker, or all are done; returns the next one."""
        self.progress.write_text("")
        command = [sys.executable, "-m", WORKER, "--seed", self.asked.seed, "--start", number, "--step", self.step]
        command += ["--stop", self.asked.n, "--progress", self.progress, "--scratch", self.scratch]
        with subprocess.Popen(
            [*map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as worker:
            stuck = threading.Event()
            done = threading.Event()
            guard = threading.Thread(target=self._watch, args=(worker, stuck, done, until))
            errors: list[str] = []
            reader = threading.Thread(target=lambda: errors.append(worker.stderr.read()))  # type: ignore[union-attr]
            guard.start()
            reader.start()
            for line in worker.stdout or ():
                result = json.loads(line)
                self.results.append(result)
                number = result["i"] + self.step
            worker.wait()
            done.set()
            guard.join()
            reader.join()
        if worker.returncode == 0 or number >= self.asked.n or time.monotonic() >= until:
            return number
        at = self.progress.read_text()
        if not at:
            raise SystemExit(f"the worker does not start:\n{errors[0][-3000:]}")
        told = "no end" if stuck.is_set() else f"the process died with {worker.returncode}: {errors[0][-600:]}"
        begun = json.loads(at)
        self.results.append({**begun, "outcome": "HANG" if stuck.is_set() else "CRASH", "told": told})
        return begun["i"] + self.step

    def _watch(
        self, worker: subprocess.Popen[str], stuck: threading.Event, done: threading.Event, until: float
    ) -> None:
        """Kill the worker when one input takes too long, or the time is up."""
        now, begun, used = "", time.monotonic(), 0.0
        while not done.wait(0.25):
            at = self.progress.read_text()
            with contextlib.suppress(OSError, IndexError):
                taken = _processor_seconds(worker.pid)
                if at != now:
                    now, begun, used = at, time.monotonic(), taken
                limit = self.asked.hang if now else 10 * self.asked.hang
                if taken - used > limit or time.monotonic() - begun > WALL * limit:
                    stuck.set()
            if stuck.is_set() or time.monotonic() > until:
                worker.kill()
                return


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _worker(*arguments: object) -> str:
    command = [sys.executable, "-m", WORKER, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def print_table(results: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Outcomes by format and kind of mutation; returns the same by "format: kind"."""
    counts: dict[str, Counter[str]] = {}
    for result in results:
        for row in (f"{result['format']}: {result['kind']}", f"{result['format']}"):
            counts.setdefault(row, Counter())[result["outcome"]] += 1
    width = max(len(row) for row in counts)
    print(f"{'':{width}} " + " ".join(f"{column:>9}" for column in COLUMNS))
    for row in sorted(counts):
        print(f"{row:{width}} " + " ".join(f"{counts[row][column] or '':>9}" for column in COLUMNS))
    return {row: {column: counts[row][column] for column in COLUMNS if counts[row][column]} for row in sorted(counts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=2000, help="how many inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so much time")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--hang", type=float, default=5.0, help="processor seconds that one input may take")
    parser.add_argument("--show", type=int, help="keep this input's folder, and run nothing")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS / 'fuzz.json'}")
    asked = parser.parse_args()
    if asked.show is not None:
        keep = Path.cwd() / f"fuzz-{asked.show}"
        print(_worker("--seed", asked.seed, "--start", asked.show, "--stop", 0, "--keep", keep))
        return
    begun = time.monotonic()
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory, prefix="ckptbridge-fuzz-") as scratch:
        lanes = [Lane(asked, start, asked.workers, Path(scratch)) for start in range(asked.workers)]
        threads = [threading.Thread(target=lane.run, args=(begun + asked.seconds,)) for lane in lanes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    seconds = time.monotonic() - begun
    results = sorted((result for lane in lanes for result in lane.results), key=lambda result: result["i"])
    table = print_table(results)
    outcomes = Counter(result["outcome"] for result in results)
    defects = [result for result in results if result["outcome"] not in FINE]
    for defect in defects:
        print(f"{defect['outcome']} {defect['i']} {defect['format']}: {defect['kind']}: {defect['told'][:600]}")
    told = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    print(f"{len(results)} inputs in {seconds:.0f} s ({len(results) / seconds:.0f} a second): {told}")
    if asked.write:
        _write(asked, len(results), seconds, outcomes, table, defects)
    sys.exit(bool(defects))


def _write(
    asked: argparse.Namespace,
    count: int,
    seconds: float,
    outcomes: Counter[str],
    table: dict[str, dict[str, int]],
    defects: list[dict[str, Any]],
) -> None:
    from measuring import provenance, write_result  # it loads torch

    result = {
        **provenance(f"python benchmarks/fuzz.py --n {asked.n} --seed {asked.seed} --write"),
        "inputs": count,
        "seconds": round(seconds, 1),
        "outcomes": dict(outcomes),
        "by_format_and_kind": table,
        "defects": defects,
    }
    write_result("fuzz.json", result)


if __name__ == "__main__":
    main()
