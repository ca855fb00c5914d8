"""What the workers share: four ranks that run the cases of a job, one after another.

Megatron is imported once, before the ranks are forked: four imports on two cores take 20 s more.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

WORLD_SIZE = 4
Case = dict[str, Any]


def start_ranks(job_file: Path, run_rank: Callable[[int, dict[str, Any]], None]) -> None:
    """`run_rank(rank, job)` in four processes. What it needs of Megatron is imported before this is called."""
    from torch.multiprocessing import start_processes

    job = json.loads(job_file.read_text())
    start_processes(run_rank, args=(job,), nprocs=WORLD_SIZE, start_method="fork")


@contextmanager
def process_group(rank: int, job: dict[str, Any], *, mode: Callable[[], Any] | None = None) -> Iterator[None]:
    """This rank among the others, on a CPU that Megatron takes for a GPU: `mode()` is on_cpu.OnCpu() by default."""
    import torch
    import torch.distributed as dist

    from ckptbridge.trainer.megatron import on_cpu

    torch.set_num_threads(1)
    store = dist.FileStore(job["store"], WORLD_SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE, timeout=timedelta(seconds=60))
    on_cpu.patch()
    with (mode or on_cpu.OnCpu)():
        yield
    dist.destroy_process_group()


def run_cases(rank: int, job: dict[str, Any], run_case: Callable[[Case], dict[str, Any]]) -> None:
    """Every rank returns a case's result, and the first writes it. An exception ends the job for every rank."""
    for case in job["cases"]:
        start = time.monotonic()
        result = run_case(case)
        if rank == 0:
            result["seconds"] = time.monotonic() - start
            Path(case["out"]).write_text(json.dumps(result))
