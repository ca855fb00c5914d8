"""The run's record: one JSON object a line and a step, in `train.jsonl` of the run folder."""

from __future__ import annotations

import gc
import json
import resource
import sys
from math import isfinite
from pathlib import Path
from typing import Any, cast

import torch

from ckptbridge.converters.disk import write_file
from ckptbridge.converters.errors import BadInputError, told
from ckptbridge.trainer.update import StepReading

LOG_NAME = "train.jsonl"


class StepLog:
    """Appends lines, each flushed. Opened at a step, it forgets the lines after it: those steps are taken again."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = [record for record in read_log(path) if record["step"] <= step] if step else []
        write_file(path, "".join(_line(record) for record in kept).encode())

    def write(self, record: dict[str, Any]) -> dict[str, Any]:
        """Append a record. Returns it as it was written: JSON knows no NaN and no infinity, null stands for them."""
        written = {name: _without_nan(value) for name, value in record.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(written))
        return written


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a run, in order; none if there is no log.

    A last line that a killed run left unfinished does not count. Raises BadInputError for any other line that is no
    record.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip().split("\n")
    records = [_parsed(line) for line in lines]
    for number, (line, record) in enumerate(zip(lines[:-1], records, strict=False), start=1):
        if record is None:
            raise BadInputError(
                f"{path}: line {number} is no record of a step, expected a JSON object with a `step`, found "
                f"{told(line)}; delete this line, or the file: a run does not need its log to continue"
            )
    return [record for record in records if record is not None]


def _parsed(line: str) -> dict[str, Any] | None:
    """The record of a line; None if it is none."""
    try:
        record = json.loads(line, parse_constant=lambda _: None)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    fields = cast(dict[str, Any], record)
    return fields if isinstance(fields.get("step"), int) else None


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(held) for key, held in cast(dict[str, Any], value).items()}
    if isinstance(value, list):
        return [_without_nan(held) for held in cast(list[Any], value)]
    return None if isinstance(value, float) and not isfinite(value) else value


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
