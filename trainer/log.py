"""The run's record: one JSON object a line and a step, in `train.jsonl` of the run folder."""

from __future__ import annotations

import gc
import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from ckptbridge.converters.disk import write_file
from ckptbridge.trainer.update import StepReading


class StepLog:
    """Appends lines, each flushed. Opened at a step, it forgets the lines after it: those steps are taken again."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= step] if step else []
        write_file(path, "".join(line + "\n" for line in kept).encode())

    def write(self, record: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a run, in order."""
    return [json.loads(line) for line in _lines(path)]


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    # A line that a killed run left unfinished does not count.
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def load_summary(result: StepReading, whole: bool) -> dict[str, Any]:
    """The router's losses and, per layer, the least and the most loaded expert's share of the choices.

    All shares if `whole`; 1/E is even. The z-loss is there where it is trained.
    """
    if not result.expert_load:
        return {}
    summary: dict[str, Any] = {
        "layers": list(result.expert_load),
        "min": [round(min(load), 4) for load in result.expert_load.values()],
        "max": [round(max(load), 4) for load in result.expert_load.values()],
    }
    if whole:
        summary["fraction"] = [[round(share, 4) for share in load] for load in result.expert_load.values()]
    z_loss = {} if result.z_loss is None else {"z_loss": result.z_loss}
    return {"aux_loss": result.aux_loss, **z_loss, "expert_load": summary}


def free_memory_bytes(device: torch.device) -> int:
    """What a GPU has left; 0 on a CPU, where nothing is planned."""
    if device.type != "cuda":
        return 0
    gc.collect()  # a captured step refers to itself: one of an earlier run in this process is gone only now
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory in use so far: of the GPU's allocator, or the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
