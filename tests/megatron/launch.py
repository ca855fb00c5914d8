"""Run cases on four ranks of the real megatron-core, all in one job: starting a job costs seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.fetch_megatron import FOLDER as MEGATRON

# A job ends at a failing case and another goes on after it. When this many have failed, the rest is not run.
MAX_FAILURES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Degrees of parallelism; what they leave of the four ranks are data-parallel replicas."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1

    def __str__(self) -> str:
        return "-".join(f"{name}{size}" for name, size in asdict(self).items() if size > 1) or "tp1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Load `folder`, which holds a metadata.json, and compare its logits with `expected`.

    `config` is the result of `megatron_kwargs`, `tokens` [batch, length], `expected` [batch, length, vocabulary].
    With `default_strictness` megatron-core itself decides what it refuses, and nothing is told of keys.
    """

    folder: Path
    layout: Layout
    config: dict[str, Any]
    tokens: Tensor
    expected: Tensor
    default_strictness: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """Save a model with random weights as `folder`/iter_0000007, with the tracker file beside it.

    `local_names` keeps the names that modules without Transformer Engine have by themselves.
    """

    folder: Path
    layout: Layout
    config: dict[str, Any]
    tokens: Tensor
    local_names: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of a case. `error` is the traceback of the rank that failed first, or "".

    A load tells the largest logit difference over all replicas (None: it was not computed), the checkpoint's keys
    that no rank asked for (`unread`) and the keys that a rank asked for in vain (`absent`).
    A save tells the saved model's `logits` [batch, length, padded vocabulary].
    """

    error: str = ""
    seconds: float = 0.0
    max_abs_diff: float | None = None
    unread: Sequence[str] = ()
    absent: Sequence[str] = ()
    logits: Tensor | None = None


def launch(cases: Sequence[Load | Save], megatron: Path = MEGATRON) -> list[Result]:
    """Run the cases on the megatron-core in a folder, and return a result for each, in order.

    Raises FileNotFoundError when megatron-core has not been fetched.
    """
    check_fetched(megatron)
    with tempfile.TemporaryDirectory() as name:
        files = [_write(case, Path(name) / str(number)) for number, case in enumerate(cases)]
        # Making the process groups of a layout takes a second, so cases that share one follow each other.
        waiting = sorted(range(len(cases)), key=lambda number: str(cases[number].layout))
        errors: dict[int, str] = {}
        while waiting and len(errors) < MAX_FAILURES:
            printed = _run([files[number] for number in waiting], Path(name) / f"job{len(errors)}", megatron)
            waiting = [number for number in waiting if not Path(files[number]["out"]).exists()]
            if waiting:
                errors[waiting.pop(0)] = printed
        errors |= dict.fromkeys(waiting, f"not run: {MAX_FAILURES} cases before it failed")
        return [_read(case, errors.get(number, "")) for number, case in enumerate(files)]


def check_fetched(megatron: Path = MEGATRON) -> None:
    """Raises FileNotFoundError when megatron-core has not been fetched."""
    if not megatron.is_dir():
        raise FileNotFoundError(f"{megatron} is missing: run `make test`, which fetches megatron-core")


def _write(case: Load | Save, folder: Path) -> dict[str, Any]:
    """A case as the worker reads it."""
    folder.mkdir()
    if isinstance(case, Load):
        torch.save(case.expected, folder / "expected.pt")
    return {
        "verb": type(case).__name__.lower(),
        "folder": str(case.folder),
        "layout": asdict(case.layout),
        "config": case.config,
        "local_names": isinstance(case, Save) and case.local_names,
        "default_strictness": isinstance(case, Load) and case.default_strictness,
        "token_ids": case.tokens.tolist(),
        "expected": str(folder / "expected.pt"),
        "logits": str(folder / "logits.pt"),
        "out": str(folder / "result.json"),
    }


def _read(case: dict[str, Any], error: str) -> Result:
    if error:
        return Result(error=error)
    logits = torch.load(case["logits"]) if case["verb"] == "save" else None
    return Result(**json.loads(Path(case["out"]).read_text()), logits=logits)


def _run(cases: list[dict[str, Any]], folder: Path, megatron: Path) -> str:
    """Run a job to its end or its first failing case; returns the end of what it printed."""
    folder.mkdir()
    finished = run_worker("worker.py", cases, folder, megatron)
    return f"exit status {finished.returncode}\n{finished.stdout[-2000:]}{finished.stderr[-8000:]}"


def run_worker(
    worker: str,
    cases: Sequence[dict[str, Any]],
    folder: Path,
    megatron: Path = MEGATRON,
    *,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run cases in a program of this folder, to their end or the first that fails; its files are put into `folder`."""
    job = folder / "job.json"
    job.write_text(json.dumps({"cases": cases, "store": str(folder / "store")}))
    command = [sys.executable, str(Path(__file__).with_name(worker)), str(job)]
    return subprocess.run(command, env=environment(megatron), capture_output=True, text=True, timeout=timeout)


def environment(megatron: Path = MEGATRON) -> dict[str, str]:
    """The variables of a process that runs megatron-core on a CPU."""
    return os.environ | {
        "PYTHONPATH": str(megatron),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
