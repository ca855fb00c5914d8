"""A process that spoils and judges one input after the other: `python -m tests.converters.fuzz_worker`.

Prints a JSON line for every input, and writes the input's number to a file before it begins, so that whoever watches
knows which one hangs, or killed it. Input `i` of a seed is always the same.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from tests.converters.fuzz_folders import Change, Mutation, Special, mutate
from tests.converters.fuzz_judge import Verdict, Watch, judge
from tests.converters.fuzz_sources import Source, all_sources

ADDRESS_SPACE = 6 << 30
"""Beyond what is taken at the start: a bomb ends here and does not take the machine with it."""


class Folder:
    """A source on disk: what an input changes is put back after it."""

    def __init__(self, source: Source, path: Path) -> None:
        self.source, self.path = source, path
        for name in source.files:
            self._put(name, source.files[name])

    def apply(self, mutation: Mutation) -> None:
        for name, change in mutation.changes.items():
            self._put(name, change)

    def restore(self, mutation: Mutation) -> None:
        for name in mutation.changes:
            self._put(name, self.source.files.get(name))

    def _put(self, name: str, change: Change) -> None:
        path = self.path / name
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        if change is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(change, bytes):
            path.write_bytes(change)
        elif change.kind == "folder":
            path.mkdir()
        elif change.kind == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(change.target)


class Fuzzer:
    """All sources in one scratch folder, and the inputs that a seed gives."""

    def __init__(self, scratch: Path, seed: int) -> None:
        self.scratch, self.seed = scratch, seed
        (scratch / "canary").mkdir()
        (scratch / "canary" / "file").write_text("untouched")
        self.folders = {
            name: Folder(source, scratch / f"source{at}")
            for at, (name, source) in enumerate(all_sources(scratch / "making").items())
        }
        self.names = list(self.folders)
        self.watch = Watch()

    def draw(self, number: int) -> tuple[str, Mutation]:
        """Which source an input is made from, and how it is spoiled."""
        rng = random.Random(f"{self.seed}/{number}")
        name = self.names[number % len(self.names)]
        return name, mutate(self.folders[name].source, rng)

    def run(self, number: int) -> dict[str, Any]:
        """Make one input, convert it, judge, and clean up."""
        name, mutation = self.draw(number)
        folder, out = self.folders[name], self.scratch / "out"
        out.mkdir()
        folder.apply(mutation)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                verdict = judge(folder.path, out / "target", folder.source, self.watch)
        finally:
            folder.restore(mutation)
            shutil.rmtree(out)
        if (self.scratch / "canary" / "file").read_text() != "untouched":
            verdict = Verdict("ESCAPE", "the canary was changed")
        files = sorted(mutation.changes)
        return {
            "i": number,
            "format": name,
            "kind": mutation.kind,
            "files": files,
            "outcome": verdict.outcome,
            "told": verdict.told,
        }


def describe(change: Change) -> str:
    if isinstance(change, Special):
        return f"{change.kind} {change.target}"
    return "nothing" if change is None else f"{len(change)} bytes"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--step", type=int, default=1)
    parser.add_argument("--stop", type=int, required=True)
    parser.add_argument("--progress", type=Path)
    parser.add_argument("--keep", type=Path, help="write the spoiled folder of input --start here, and run nothing")
    parser.add_argument("--scratch", type=Path, help="a folder for everything; best one in memory")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    faulthandler.enable()
    with tempfile.TemporaryDirectory(dir=asked.scratch) as scratch:
        fuzzer = Fuzzer(Path(scratch), asked.seed)
        if asked.keep:
            name, mutation = fuzzer.draw(asked.start)
            Folder(fuzzer.folders[name].source, asked.keep).apply(mutation)
            told = {file: describe(change) for file, change in mutation.changes.items()}
            sys.stdout.write(json.dumps({"format": name, "kind": mutation.kind, "changes": told}) + "\n")
            return
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE, used + ADDRESS_SPACE))
        for number in range(asked.start, asked.stop, asked.step):
            if asked.progress:
                name, mutation = fuzzer.draw(number)
                asked.progress.write_text(json.dumps({"i": number, "format": name, "kind": mutation.kind}))
            result = fuzzer.run(number)
            with contextlib.suppress(BrokenPipeError):
                sys.stdout.write(json.dumps(result) + "\n")
                sys.stdout.flush()
            if number // asked.step % 50 == 0:
                gc.collect()


if __name__ == "__main__":
    sys.exit(main())
