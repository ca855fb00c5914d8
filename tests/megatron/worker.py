"""Four ranks of the real megatron-core: run by launch.py as `worker.py JOB.json`.

A job is a list of cases. Each is run under its own parallel layout, and its result is a JSON file.
Megatron is imported once, before the ranks are forked: four imports on two cores take 20 s more.
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
    import_module("checkpoint")  # it imports torch and megatron
    from torch.multiprocessing import start_processes

    job = json.loads(job_file.read_text())
    start_processes(run_rank, args=(job,), nprocs=WORLD_SIZE, start_method="fork")


def run_rank(rank: int, job: dict[str, Any]) -> None:
    """All cases of the job, on one rank. An exception ends the job for every rank."""
    import torch
    import torch.distributed as dist
    from megatron.core.transformer.moe import moe_utils

    from ckptbridge.trainer.megatron import on_cpu

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    store = dist.FileStore(job["store"], WORLD_SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE, timeout=timedelta(seconds=60))
    on_cpu.patch()
    if not hasattr(moe_utils, "te_general_gemm"):  # 0.16 asks for it, and has it only beside Transformer Engine
        moe_utils.te_general_gemm = None
    with on_cpu.OnCpu():
        for case in job["cases"]:
            start = time.monotonic()
            result = run_case(case)
            if rank == 0:
                result["seconds"] = time.monotonic() - start
                Path(case["out"]).write_text(json.dumps(result))
    dist.destroy_process_group()


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """One load or save, on this rank; every rank returns the same result."""
    import checkpoint
    import torch

    from ckptbridge.trainer.megatron import model

    model.use_layout(**case["layout"])
    gpt = model.build(case["config"], local_names=case["local_names"], **case["layout"])
    verb = {"load": checkpoint.load, "save": checkpoint.save}[case["verb"]]
    return verb(gpt, case, torch.tensor(case["token_ids"]))


if __name__ == "__main__":  # megatron's writer starts a process that imports this file
    main(Path(sys.argv[1]))
