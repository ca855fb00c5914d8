"""The folder in which distilled layers lie until the mixture is written: their files, and no others."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ckptbridge.converters.copying import Copier
from ckptbridge.converters.disk import write_file
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.pass_through import safetensors_file
from ckptbridge.converters.tensors import Checkpoint

_OURS = re.compile(r"layer_\d{4,}\.(safetensors|json)(\.tmp)?")
_WRITE_NBYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DistilledLayer:
    """|mixture - dense| / |dense| of a layer's output on held-out tokens, before and after it was trained."""

    layer: int
    before: float
    after: float


class Scratch:
    """The files of one layer: its weights, and then what is told of them."""

    def __init__(self, work: Path, layer: int, key: str) -> None:
        self.key, self.work = key, work
        self.weights = work / f"layer_{layer:04d}.safetensors"
        self._told = work / f"layer_{layer:04d}.json"

    def outcome(self) -> DistilledLayer | None:
        """What an earlier run of the same key tells of the layer, if it came so far."""
        if not (self._told.is_file() and self.weights.is_file()):
            return None
        told = json.loads(self._told.read_text())
        return DistilledLayer(**told["layer"]) if told["key"] == self.key else None

    def keep(self, tensors: Checkpoint, outcome: DistilledLayer) -> None:
        """Write both, the weights first; whichever of them is there is whole. The first layer makes the folder."""
        self.work.mkdir(parents=True, exist_ok=True)
        self._told.unlink(missing_ok=True)
        file = safetensors_file(self.weights.name + ".tmp", tensors)
        Copier(self.work, workers=1, max_ram=_WRITE_NBYTES, progress=None, total=file.tensor_nbytes).write(file)
        (self.work / file.name).replace(self.weights)
        write_file(self._told, json.dumps({"key": self.key, "layer": asdict(outcome)}).encode())


def check_scratch(work: Path) -> None:
    """Raise BadInputError if what has the folder's name is no folder of distilled layers alone, or a link to one."""
    if not (work.exists() or work.is_symlink()):
        return
    if work.is_symlink() or not work.is_dir():
        found = "is a link" if work.is_symlink() else "is no folder"
    elif others := sorted(path.name for path in work.iterdir() if not _is_ours(path)):
        found = f"holds {others[0]}" + (f" and {len(others) - 1} more" if len(others) > 1 else "")
    else:
        return
    raise BadInputError(
        f"{work}: {found}, but distillation keeps its layers in a folder of this name and removes them at the end; "
        "move it away, or name another target"
    )


def remove_scratch(work: Path) -> None:
    """Remove the layers' files, and the folder if nothing else came into it."""
    for path in work.iterdir():
        if _is_ours(path):
            path.unlink()
    with suppress(OSError):
        work.rmdir()


def _is_ours(path: Path) -> bool:
    return _OURS.fullmatch(path.name) is not None and path.is_file()
