"""A step of the demo: a progress bar while it runs, one line when it is done, its numbers in results.json."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from ckptbridge.converters.errors import CkptBridgeError

RESULTS_NAME = "results.json"

STYLES = {True: "green", False: "bold red"}
"""How passed and failed checks look."""

Show = Callable[[float, float, str], None]
"""Called with what is done, what there is in all, and a few words for the bar."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """A number to show. `text` is how people read it; `wanted` and `passed` are set where it is a check."""

    label: str
    value: Any
    text: str
    wanted: str | None = None
    passed: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a step found: a line for people, and numbers by name."""

    line: str
    numbers: dict[str, Number]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(number.passed is not False for number in self.numbers.values())


class NotApplicable(Exception):
    """The step has no meaning for this model; the demo says why and passes over it."""


@dataclass(slots=True)
class Record:
    """All steps so far, kept on the disk after each. `console` of None shows nothing, `quiet` only failures."""

    folder: Path
    console: Console | None
    quiet: bool = False
    steps: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    outcomes: dict[str, Outcome] = field(default_factory=dict[str, Outcome])
    started: float = field(default_factory=time.perf_counter)

    def step(self, key: str, title: str, needs: tuple[str, ...], work: Callable[[Show], Outcome]) -> None:
        """Run a step unless one that it needs gave nothing. Failures are recorded and shown, not raised."""
        if missing := next((need for need in needs if need not in self.outcomes), None):
            cause = self.steps[missing]
            self._skip(key, title, cause.get("skipped") or f"it needs what the step {cause['title']!r} did not give")
            return
        begun = time.perf_counter()
        _give_back_memory()
        try:
            with _Bar(title, None if self.quiet else self.console) as bar:
                outcome = work(bar.show)
        except NotApplicable as reason:
            self._skip(key, title, str(reason))
            return
        except CkptBridgeError as error:
            self._keep(key, {"title": title, "passed": False, "error": str(error)})
            self._print("✗ failed:", STYLES[False], str(error))
            return
        self.outcomes[key] = outcome
        numbers = {name: _plain(number) for name, number in outcome.numbers.items()}
        seconds = round(time.perf_counter() - begun, 2)
        self._keep(
            key,
            {
                "title": title,
                "passed": outcome.passed,
                "seconds": seconds,
                "line": outcome.line,
                "numbers": numbers,
            },
        )
        self._print("✓" if outcome.passed else "✗ failed:", STYLES[outcome.passed], outcome.line)
        for number in outcome.numbers.values():
            if number.passed is False:
                self._print("  ✗", STYLES[False], f"{number.label}: {number.text}, wanted {number.wanted}")

    def results(self, finished: bool) -> dict[str, Any]:
        """Everything for machines: `passed`, the steps, seconds and peak memory."""
        return {
            "demo": 1,
            "finished": finished,
            "passed": finished and all(step["passed"] is not False for step in self.steps.values()),
            "seconds": round(time.perf_counter() - self.started, 1),
            "peak_rss_bytes": peak_rss_bytes(),
            "folder": str(self.folder),
            "steps": self.steps,
        }

    def save(self, finished: bool = False) -> dict[str, Any]:
        """Write results.json and return what it holds."""
        results = self.results(finished)
        (self.folder / RESULTS_NAME).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        return results

    def _skip(self, key: str, title: str, reason: str) -> None:
        self._keep(key, {"title": title, "passed": None, "skipped": reason})
        self._print("–", "yellow", f"{title}: skipped, {reason}")

    def _keep(self, key: str, step: dict[str, Any]) -> None:
        self.steps[key] = step
        self.save()

    def _print(self, mark: str, style: str, text: str) -> None:
        if self.console is not None and (not self.quiet or style == STYLES[False]):
            self.console.print(Text.assemble("  ", (mark, style), " ", text), soft_wrap=True)


class _Bar:
    """A bar that stays on the screen when its step is done; nothing without a console."""

    def __init__(self, title: str, console: Console | None) -> None:
        self._progress: Progress | None = None
        if console is not None:
            columns = (
                SpinnerColumn(finished_text=" "),
                TextColumn("[bold]{task.description:<26}[/]"),
                BarColumn(bar_width=20),
                TimeElapsedColumn(),
                TextColumn("{task.fields[told]}"),
            )
            self._progress = Progress(*columns, console=console)
            self._task = self._progress.add_task(title, total=None, told="")

    def __enter__(self) -> _Bar:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._progress:
            if kind is None:
                total = self._progress.tasks[0].total or 1
                self._progress.update(self._task, total=total, completed=total)
            self._progress.stop()

    def show(self, done: float, total: float, told: str) -> None:
        """Move the bar."""
        if self._progress:
            self._progress.update(self._task, completed=done, total=total, told=told)


def _give_back_memory() -> None:
    """Return what the last step freed to the system, where the C library can.

    glibc keeps freed blocks below 32 MB, most of a small model: 6.3 GB instead of 5.8 at the demo's peak. (Making
    it keep none, by mallopt, would give 5.4 GB for a seventh more CPU time.)
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak_rss_bytes() -> int:
    """The most memory that this process has held, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _plain(number: Number) -> dict[str, Any]:
    finite = not isinstance(number.value, float) or math.isfinite(number.value)
    plain = {"label": number.label, "value": number.value if finite else None, "text": number.text}
    return plain if number.wanted is None else {**plain, "wanted": number.wanted, "passed": number.passed}
