"""Four ranks that train with the real megatron-core: run as `training_worker.py JOB.json`.

Like worker.py, whose ranks only compute; here gradients are on.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

WORLD_SIZE = 4


def main(job_file: Path) -> None:
    import_module("training")  # it imports torch and megatron
    from torch.multiprocessing import start_processes

    job = json.loads(job_file.read_text())
    start_processes(run_rank, args=(job,), nprocs=WORLD_SIZE, start_method="fork")


def run_rank(rank: int, job: dict[str, Any]) -> None:
    """All cases of the job, on one rank. An exception ends the job for every rank."""
    import torch
    import torch.distributed as dist
    import training
    import virtual_pipeline

    from ckptbridge.trainer.megatron import on_cpu

    class Trainable(on_cpu.OnCpu):
        """The optimizer asks a parameter for its type and wants to hear that it is on a GPU."""

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = super().__torch_function__(func, types, args, kwargs)
            if func is torch.Tensor.type and len(args) == 1:
                return found.replace("torch.", "torch.cuda.")
            return found

    torch.set_num_threads(1)
    store = dist.FileStore(job["store"], WORLD_SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE, timeout=timedelta(seconds=60))
    on_cpu.patch()
    training.forgive_step()
    with Trainable():
        for case in job["cases"]:
            start = time.monotonic()
            verbs = {"train": training.train, "resume": training.resume, "hold": virtual_pipeline.hold}
            result = verbs[case["verb"]](case)
            if rank == 0:
                result["seconds"] = time.monotonic() - start
                Path(case["out"]).write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":  # megatron's writer starts a process that imports this file
    main(Path(sys.argv[1]))
