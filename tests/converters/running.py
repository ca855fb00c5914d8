"""How the tests run conversions: planned small, interrupted, and in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptbridge.converters.convert import ConversionPlan, ConvertOptions, plan_conversion
from ckptbridge.converters.execute import execute, partial_folder
from ckptbridge.converters.model import open_model

ROOT = Path(__file__).parents[2]
SMALL = {"max_file_size": 150_000, "max_shard_size": 150_000, "workers": 1}


def planned(source: Path, target: Path, to: str = "torch_dist", **options: Any) -> ConversionPlan:
    return plan_conversion(open_model(source), target, to, ConvertOptions(**SMALL | options))  # type: ignore[arg-type]


class Interrupted(Exception):
    """Stands in for Ctrl-C."""


def interrupt_after(nbytes: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= nbytes:
            raise Interrupted

    return progress


def begin(plan: ConversionPlan, share: float = 0.6) -> Path:
    """Begin a conversion and interrupt it; returns the partial folder."""
    with pytest.raises(Interrupted):
        execute(plan, interrupt_after(int(share * plan.nbytes)))
    assert not plan.target.exists()
    assert partial_folder(plan.target).exists()
    return partial_folder(plan.target)


def run_module(module: str, *arguments: object, prefix: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run a module of the tests in a process of its own; returns the JSON object that it prints last."""
    command = [*prefix, sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}
