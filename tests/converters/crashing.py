"""Kill a conversion with SIGKILL again and again and tell what it leaves: run as `python -m tests.converters.crashing`.

One process imports everything once and forks a child for each attempt, so that an attempt costs milliseconds.
Prints one JSON object; the test that started it judges.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import open_model


def digests(folder: Path) -> dict[str, str] | None:
    """Every file below a folder with its digest; None if there is no such folder."""
    if not folder.exists():
        return None
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def in_child(work: Callable[[], None], kill_after: float | None = None) -> int:
    """Run `work` in a forked child, killed after some seconds; returns the exit status as waitpid gives it."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:  # nothing may unwind past the fork
            sys.stderr.write(f"child: {type(error).__name__}: {error}\n")
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


STEPS = ("fsync", "rename", "replace", "unlink", "rmdir")
"""The operations by which a conversion becomes durable, and after which a kill leaves something else."""


def guarded(work: Callable[[], None], before_step: Callable[[int], None]) -> Callable[[], None]:
    """`work`, with `before_step(number)` called before each durable operation."""

    def run() -> None:
        numbers = itertools.count()

        def guard(operation: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                before_step(next(numbers))
                return operation(*arguments, **named)

            return call

        for name in STEPS:
            setattr(os, name, guard(getattr(os, name)))
        work()
        before_step(next(numbers))

    return run


def dying_at(step: int, work: Callable[[], None]) -> Callable[[], None]:
    """`work`, which is killed in place of its durable operation number `step`."""
    return guarded(work, lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == step else None)


def counting_steps(work: Callable[[], None]) -> Callable[[], None]:
    """`work`, whose exit status is the number of its durable operations."""
    last = 0

    def note(number: int) -> None:
        nonlocal last
        last = number

    def run() -> None:
        guarded(work, note)()
        os._exit(last)

    return run


class Attempts:
    """Conversions of one source to `root/target`, killed and judged."""

    def __init__(self, source: Path, root: Path, to: str, *, replacing: bool) -> None:
        self.source, self.root, self.to = source, root, to
        self.target = root / "target"
        begun = time.monotonic()
        self.again: dict[str, Any] = {}
        self.must(self.conversion())
        self.duration = time.monotonic() - begun
        self.known = {"none": None, "whole": digests(self.target)}
        if replacing:
            self.again = {"overwrite": True}
            self.must(self.conversion(dtype=torch.float16))
            self.known["old"] = digests(self.target)
            self.target.rename(root / "old")

    def conversion(self, **options: Any) -> Callable[[], None]:
        sizes = {"max_file_size": 400_000, "max_shard_size": 400_000, "workers": 1}
        wanted = ConvertOptions(**sizes | self.again | options)

        def run() -> None:
            execute(plan_conversion(open_model(self.source), self.target, self.to, wanted))  # type: ignore[arg-type]

        return run

    def must(self, work: Callable[[], None]) -> None:
        if in_child(work):
            raise SystemExit("a conversion that nobody disturbed failed")

    def is_now(self, folder: Path) -> str:
        """Which of the known checkpoints a folder is, byte for byte."""
        left = digests(folder)
        return next((name for name, value in self.known.items() if value == left), "torn")

    def judge(self, status: int) -> dict[str, Any]:
        """What a killed attempt left, and what a resumed one makes of it; then clean up."""
        partial, replaced = self.root / "target.partial", self.root / "target.replaced"
        told: dict[str, Any] = {
            "killed": os.WIFSIGNALED(status),
            "target": self.is_now(self.target),
            "replaced": self.is_now(replaced),
            "partial": partial.exists(),
        }
        if told["target"] != "whole":
            told["resumed"] = in_child(self.conversion(resume=True))
            told["after"] = self.is_now(self.target)
        told["litter"] = sorted(path.name for path in self.root.iterdir() if path.name not in ("target", "old"))
        for folder in (self.target, partial, replaced):
            shutil.rmtree(folder, ignore_errors=True)
        return told

    def prepare(self) -> None:
        shutil.rmtree(self.target, ignore_errors=True)
        if "old" in self.known:
            shutil.copytree(self.root / "old", self.target)


def main(source: Path, root: Path, to: str, how: str) -> dict[str, Any]:
    """All attempts of one kind: `how` is "everywhere", "sometime" or "replacing" (the last steps of an overwrite)."""
    attempts = Attempts(source, root, to, replacing=how == "replacing")
    told: list[dict[str, Any]] = []
    if how == "sometime":
        generator = random.Random(3)
        while len(told) < 30 and sum(attempt["killed"] for attempt in told) < 4:
            attempts.prepare()
            delay = generator.uniform(0.1, 0.9) * attempts.duration
            told.append(attempts.judge(in_child(attempts.conversion(), kill_after=delay)))
    else:
        attempts.prepare()
        steps = os.waitstatus_to_exitcode(in_child(counting_steps(attempts.conversion())))
        for step in range(max(0, steps - 30) if how == "replacing" else 0, steps):
            attempts.prepare()
            told.append(attempts.judge(in_child(dying_at(step, attempts.conversion()))))
    return {"files": len(attempts.known["whole"] or {}), "attempts": told}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])))
