"""Ranks of the real megatron-core: started by launch.py as `python -m ckptbridge.trainer.megatron.worker JOB.json`.

A job is a list of runs, each one checkpoint under one layout. A run's ranks are forked from this process, which
has imported Megatron once (4 s), and every run has ranks of its own, so that it leaves no memory behind. When
they have ended, a line on stdout tells the keys that did not fit; the logits lie in a file. Whatever Megatron
prints goes to stderr. A failing rank ends the job: its traceback is the last thing on stderr.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.multiprocessing import start_processes

from ckptbridge.trainer.megatron import model, on_cpu


def main(job_file: Path) -> None:
    """Do the runs in order."""
    job = json.loads(job_file.read_text())
    with os.fdopen(os.dup(1), "w") as results:
        os.dup2(2, 1)
        for run in job["runs"]:
            ranks = run["world_size"]
            start_processes(run_rank, args=(run, job["token_ids"]), nprocs=ranks, start_method="fork")
            results.write(Path(run["result"]).read_text() + "\n")
            results.flush()


def run_rank(rank: int, run: dict[str, Any], token_ids: list[int]) -> None:
    """One rank of a run. Raises whatever went wrong as an Exception, whose traceback `start_processes` passes on."""
    try:
        load_and_compute(rank, run, token_ids)
    except CheckpointException as error:  # torch derives it from BaseException
        raise RuntimeError(str(error)) from error


def load_and_compute(rank: int, run: dict[str, Any], token_ids: list[int]) -> None:
    """A rank's part of a run: the logits are written by one rank of the last stage, the keys by the first of all."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // run["world_size"]))
    torch.set_grad_enabled(False)
    store = dist.FileStore(run["store"], run["world_size"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=run["world_size"])
    on_cpu.patch()
    with on_cpu.OnCpu():
        model.use_layout(**run["degrees"])
        dtype = getattr(torch, run["dtype"])
        gpt = model.build(run["config"], local_names=run["local_names"], dtype=dtype, **run["degrees"])
        result = load(gpt, run["folder"])
        output = model.logits(gpt, torch.tensor([token_ids]))
        if output is not None and parallel_state.get_data_parallel_rank() == 0:
            _write(output[0, :, : run["vocab_size"]], run["logits"])
    if rank == 0:
        Path(run["result"]).write_text(json.dumps(result))
    dist.destroy_process_group()


def load(gpt: model.GPTModel, folder: str) -> dict[str, list[str]]:
    """Load the model as Megatron-LM does; returns the keys that did not fit, the same on every rank.

    "absent" are keys that a rank asked for in vain (megatron-core's word: unexpected), "unread" those that no
    rank asked for (megatron-core's word: missing). A weight that was not loaded is NaN, and so are the logits.
    """
    for parameter in gpt.parameters():
        parameter.fill_(float("nan"))
    metadata = dist_checkpointing.load_content_metadata(folder)
    wanted = {"model": gpt.sharded_state_dict(metadata=dict(metadata or {}))}
    loaded, unread, absent = dist_checkpointing.load(wanted, folder, strict="return_all")
    gpt.load_state_dict(loaded["model"], strict=not absent)
    absent_anywhere: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(absent_anywhere, set(absent))
    return {"absent": sorted(set().union(*absent_anywhere)), "unread": sorted(unread)}


def _write(logits_TV: Tensor, path: str) -> None:
    """The whole logits as fp32; every TP rank has gathered them, and the first one writes."""
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        file = torch.from_file(path, shared=True, size=logits_TV.numel(), dtype=torch.float32)
        file.view(logits_TV.shape).copy_(logits_TV)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
