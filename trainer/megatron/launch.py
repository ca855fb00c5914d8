"""Run checkpoints through the real megatron-core, each under one or several parallel layouts.

It runs on the CPU, as many processes on this machine as the layout has ranks, also where there are GPUs: what is
asked is whether Megatron loads the files and computes the same, not how fast. Memory holds the model once (dense
weights once more for each data-parallel replica that a layout with ep brings) in the dtype of the computation.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.fold import folded
from ckptbridge.converters.mcore.torch_dist_reader import iteration_folder
from ckptbridge.converters.model import Model
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.trainer.megatron.config import transformer_config
from ckptbridge.trainer.megatron.layouts import layout_name

_RAISED = re.compile(r"[\w.]+(Error|Exception)(: |$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A Megatron checkpoint, and the layout under which to load it."""

    model: Model
    layout: ParallelLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """What megatron-core made of a run. Numbers of layers are folded in the keys' names."""

    run: Run
    logits_TV: Tensor
    """fp32 [T, vocab_size] in a file that is gone when the next result is asked for; NaN where a weight was absent."""
    missing_keys: tuple[str, ...]
    """Keys that Megatron asks for and the checkpoint lacks."""
    unexpected_keys: tuple[str, ...]
    """The checkpoint's weights that no rank asks for."""


def compute(runs: Sequence[Run], ids_T: Tensor, dtype: torch.dtype, folder: Path) -> Iterator[Computed]:
    """The runs' results as they come, in order; temporary files go into `folder`. Close it if you stop early.

    Raises, before anything runs, NotSupportedError if megatron-core cannot be imported or cannot be told this
    model, and BadInputError if a layout does not fit it; BadInputError with a rank's error and its log if one fails.
    """
    check_installed()
    jobs = [_job(run, dtype, folder / f"run{number}") for number, run in enumerate(runs)]
    job_file = folder / "job.json"
    job_file.write_text(json.dumps({"runs": jobs, "token_ids": ids_T.tolist()}))
    return _results(runs, jobs, len(ids_T), job_file)


def check_installed() -> None:
    """Raises NotSupportedError, which says what to do, if megatron-core cannot be imported."""
    try:
        found = find_spec("megatron.core")
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise NotSupportedError(
            "--engine megatron runs the real megatron-core, which is not installed: on Python 3.12 or newer, "
            "pip install 'ckptbridge[mcore]'; elsewhere unzip its wheel and put the folder on PYTHONPATH. "
            "--engine reference needs neither"
        )


def _job(run: Run, dtype: torch.dtype, stem: Path) -> dict[str, Any]:
    """A run as the worker reads it."""
    model, layout = run.model, run.layout
    if layout.vpp > 1:
        raise NotSupportedError(f"vpp is {layout.vpp}: verification runs pipelines without virtual stages")
    layout.check(model.config)
    return {
        "folder": str(iteration_folder(model.path)),
        "config": transformer_config(model.config, tp=layout.tp),
        "degrees": {"tp": layout.tp, "pp": layout.pp, "ep": layout.ep, "etp": layout.expert_tp},
        "world_size": layout.world_size,
        # Megatron without Transformer Engine saves this norm under another name.
        "local_names": not any(".pre_mlp_layernorm." in key for key in model.sources),
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": model.config.vocab_size,
        "store": f"{stem}.store",
        "logits": f"{stem}.logits",
        "result": f"{stem}.json",
    }


def _results(runs: Sequence[Run], jobs: list[dict[str, Any]], tokens: int, job_file: Path) -> Iterator[Computed]:
    handle, log = tempfile.mkstemp(prefix="ckptbridge-megatron-", suffix=".log")
    with os.fdopen(handle, "wb") as stderr:
        worker = _start(job_file, stderr)
    failed = False
    with worker:
        try:
            for run, job in zip(runs, jobs, strict=True):
                line = worker.stdout.readline() if worker.stdout else ""
                if failed := not line:
                    worker.wait()
                    raise BadInputError(_last_words(run, Path(log)))
                yield _computed(run, job, json.loads(line), tokens)
                Path(job["logits"]).unlink()
            worker.wait()
        finally:
            if worker.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(worker.pid, signal.SIGTERM)
            if not failed:
                Path(log).unlink()


def _start(job_file: Path, stderr: Any) -> subprocess.Popen[str]:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),  # where this process finds Megatron
        "PYTHONWARNINGS": "ignore",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",  # of the process that forks; each rank sets its own number
        "TORCHDYNAMO_DISABLE": "1",  # or Megatron compiles for the CPU, which takes longer than it saves
    }
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "ckptbridge.trainer.megatron.worker", str(job_file)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=environment,
        text=True,
        start_new_session=True,  # a group of its own, so that its ranks can be ended with it
    )


def _computed(run: Run, job: dict[str, Any], keys: dict[str, list[str]], tokens: int) -> Computed:
    vocabulary = run.model.config.vocab_size
    logits = torch.from_file(job["logits"], shared=False, size=tokens * vocabulary, dtype=torch.float32)
    # A training checkpoint also holds what no model asks for: the optimizer, random states, TE's extra states.
    weights = {key.partition("@")[0] for key in run.model.sources}
    return Computed(
        run=run,
        logits_TV=logits.view(tokens, vocabulary),
        missing_keys=tuple(folded(keys["absent"])),
        unexpected_keys=tuple(folded(key for key in keys["unread"] if key in weights)),
    )


def _last_words(run: Run, log: Path) -> str:
    """The last exception's own line: what follows it may be advice, what precedes it are tracebacks."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    raised = [line for line in lines if _RAISED.match(line)]
    words = [*lines[-1:], *raised[-1:]] or ["it ended without a word"]
    return (
        f"{run.model.path}: megatron-core failed under {layout_name(run.layout)}: {words[-1]}\n"
        f"The whole of what it said: {log}"
    )
