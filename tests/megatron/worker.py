"""Four ranks of the real megatron-core: run by launch.py as `worker.py JOB.json`.

A job is a list of cases. Each is run under its own parallel layout, and its result is a JSON file.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from job_ranks import process_group, run_cases, start_ranks


def main(job_file: Path) -> None:
    import_module("checkpoint")  # it imports torch and megatron
    start_ranks(job_file, run_rank)


def run_rank(rank: int, job: dict[str, Any]) -> None:
    """All cases of the job, on one rank."""
    import torch
    from megatron.core.transformer.moe import moe_utils

    torch.set_grad_enabled(False)
    if not hasattr(moe_utils, "te_general_gemm"):  # 0.16 asks for it, and has it only beside Transformer Engine
        moe_utils.te_general_gemm = None
    with process_group(rank, job):
        run_cases(rank, job, run_case)


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
