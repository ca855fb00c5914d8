"""Four ranks that train with the real megatron-core: run as `training_worker.py JOB.json`.

Like worker.py, whose ranks only compute; here gradients are on.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from job_ranks import Case, process_group, run_cases, start_ranks


def main(job_file: Path) -> None:
    import_module("training")  # it imports torch and megatron
    start_ranks(job_file, run_rank)


def run_rank(rank: int, job: dict[str, Any]) -> None:
    """All cases of the job, on one rank."""
    import torch
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

    def run_case(case: Case) -> dict[str, Any]:
        verbs = {"train": training.train, "resume": training.resume, "hold": virtual_pipeline.hold}
        return verbs[case["verb"]](case)

    training.forgive_step()
    with process_group(rank, job, mode=Trainable):
        run_cases(rank, job, run_case)


if __name__ == "__main__":  # megatron's writer starts a process that imports this file
    main(Path(sys.argv[1]))
