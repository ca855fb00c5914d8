"""Training cases on four ranks of the real megatron-core: jobs of training_worker.py."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tests.megatron.launch import Layout, check_fetched, run_worker

Snapshot = Mapping[str, Mapping[str, Tensor]]
"""State ("" is the weight, else param, exp_avg, exp_avg_sq) -> megatron-core's key -> the whole tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """A model trained for two steps and saved as `saves` says ({format: folder}), then for a third.

    `config` is the result of `megatron_kwargs`. With `distributed` the optimizer is the distributed one; a
    `bucket_size` overlaps the reduction of gradients, for which buckets of so many elements are made.
    """

    layout: Layout
    config: dict[str, Any]
    distributed: bool
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    bucket_size: int | None = None
    saves: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resuming:
    """The checkpoint `folder` of two steps loaded as `ckpt_format`, and the third step taken if it is to be."""

    layout: Layout
    config: dict[str, Any]
    distributed: bool
    folder: Path
    ckpt_format: Literal["torch_dist", "torch"]
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    bucket_size: int | None = None
    third_step: bool = True
    in_chunks: bool = False
    """Into two model chunks a rank (virtual pipeline parallelism), from `torch`, in bf16; no step is taken then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """`held` is what the ranks held after the second step, `after` after the third; `loss` is the third step's.

    Without a third step the loss is NaN, and `after` is `held`.
    """

    loss: float
    steps: Sequence[float]
    held: Snapshot
    after: Snapshot


def launch_training(cases: Sequence[Training | Resuming]) -> list[Trained]:
    """Run the cases in one job. Raises RuntimeError with the failing rank's traceback."""
    check_fetched()
    with tempfile.TemporaryDirectory() as name:
        files = [_described(case, Path(name) / f"{number}.json") for number, case in enumerate(cases)]
        # Cases that share a layout follow each other; those in chunks come last, with process groups of their own.
        ordered = sorted(files, key=lambda case: (case["verb"] == "hold", str(case["layout"])))
        _run(ordered, Path(name))
        return [_read(case) for case in files]


def _described(case: Training | Resuming, out: Path) -> dict[str, Any]:
    described: dict[str, Any] = {
        "layout": asdict(case.layout),
        "config": case.config,
        "distributed": case.distributed,
        "dtype": case.dtype,
        "bucket_size": case.bucket_size,
        "out": str(out),
    }
    if isinstance(case, Training):
        return described | {
            "verb": "train",
            "third_step": True,
            "saves": {name: str(path) for name, path in case.saves.items()},
        }
    told = {"folder": str(case.folder), "format": case.ckpt_format, "third_step": case.third_step}
    return described | {"verb": "hold" if case.in_chunks else "resume"} | told


def _read(case: dict[str, Any]) -> Trained:
    told, held = json.loads(Path(case["out"]).read_text()), torch.load(case["out"] + ".pt")
    return Trained(
        loss=(told["losses"] or [float("nan")])[-1], steps=told["steps"], held=held["held"], after=held["after"]
    )


def _run(cases: list[dict[str, Any]], folder: Path) -> None:
    finished = run_worker("training_worker.py", cases, folder)
    if finished.returncode:
        raise RuntimeError(f"exit status {finished.returncode}\n{finished.stderr[-6000:]}")
