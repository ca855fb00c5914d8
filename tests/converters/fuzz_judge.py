"""What the converter does with a spoiled checkpoint, and whether that is right.

What was converted is compared with what the spoiled source holds by fuzz_reference.py, which shares no reader with the
converter.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.errors import BadInputError, CkptBridgeError, StorageError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import Model, open_model
from ckptbridge.converters.reshard import plan_reshard
from ckptbridge.verbs.inspect import description
from tests.converters.fuzz_reference import difference, differences, heal
from tests.converters.fuzz_sources import Source

MAX_RAM = 32 << 20
CONSTANT = 96 << 20
"""What a run may take beside --max-ram: two conversions' plans, and what the allocator keeps."""
CONVERTED, REFUSED, STORAGE, CRASH = "converted", "refused", "storage", "CRASH"
WRONG, ESCAPE, MEMORY, HANG, MESSAGE = "WRONG", "ESCAPE", "MEMORY", "HANG", "MESSAGE"
FINE = (CONVERTED, REFUSED, STORAGE)
OUTCOMES = (*FINE, CRASH, HANG, MEMORY, ESCAPE, WRONG, MESSAGE)
LONGEST_MESSAGE = 10_000


@dataclass(frozen=True)
class Verdict:
    outcome: str
    told: str


class Watch:
    """Notes every attempt to write or to run something outside one folder, through Python's audit events."""

    def __init__(self) -> None:
        self.allowed: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.allowed is None:
            return
        if event in _RUNNING or event.startswith("socket."):
            self.seen.append(f"{event}{arguments!r:.200}")
        elif event == "open":
            path, mode, flags = arguments
            writes = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if (writes or (mode and set(mode) & set("wax+"))) and not isinstance(path, int):
                self._check(event, path, -1)
        elif event in _WRITING:
            for at, directory in _WRITING[event]:
                self._check(event, arguments[at], arguments[directory] if directory is not None else -1)

    def _check(self, event: str, path: Any, directory: int) -> None:
        base = str(Path(f"/proc/self/fd/{directory}").readlink()) if directory not in (-1, None) else str(Path.cwd())
        full = os.path.normpath(os.path.join(base, os.fsdecode(path)))  # noqa: PTH118 - links stay as they are
        if not full.startswith((self.allowed or "", "/proc/self/")):
            self.seen.append(f"{event} {full}")


_RUNNING = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn", "subprocess.Popen", "os.startfile"}
_WRITING: dict[str, list[tuple[int, int | None]]] = {
    "os.mkdir": [(0, 2)],
    "os.rename": [(0, 2), (1, 3)],
    "os.remove": [(0, 1)],
    "os.rmdir": [(0, 1)],
    "os.link": [(1, 3)],
    "os.symlink": [(1, 2)],
    "os.truncate": [(0, None)],
    "os.chmod": [(0, 2)],
    "shutil.rmtree": [(0, None)],
}


def judge(folder: Path, target: Path, source: Source, watch: Watch) -> Verdict:
    """Open, describe, plan and convert `folder`; to a Megatron format and back where the source is Hugging Face's.

    Where the reference reader is stricter than the converter and refuses what was converted, the result has to be
    what it reads from the sound source with the spoiled tensors' bytes: the other damage is to bytes that say nothing.
    """
    _forget_the_peak()
    before = _resident()
    watch.seen, watch.allowed = [], str(target.parent)
    peaks: list[int] = []
    try:
        verdict = _judged(folder, target, source, peaks)
    except StorageError as error:
        verdict = _message(STORAGE, str(error), folder)
    except BadInputError as error:
        verdict = _message(REFUSED, str(error), folder)
    except CkptBridgeError as error:
        verdict = Verdict(CRASH, f"{type(error).__name__}: {error}")
    except (MemoryError, RecursionError, Exception) as error:  # what a user would see as a traceback
        verdict = Verdict(CRASH, _told(error))
    finally:
        watch.allowed = None
    if watch.seen:
        return Verdict(ESCAPE, f"{watch.seen[0]} (after: {verdict.told[:200]})")
    grown = max(peaks, default=_peak()) - before
    if grown > MAX_RAM + CONSTANT or "more memory than there is" in verdict.told:
        return Verdict(MEMORY, f"{grown >> 20} MiB (after {verdict.outcome}: {verdict.told[:300]})")
    return verdict


def converted(folder: Path, target: Path, to: str) -> tuple[Model, dict[str, Tensor], dict[str, Any]]:
    """What becomes of a folder's tensors on the way to Hugging Face, with the model and its config.json."""
    options = ConvertOptions(max_ram=MAX_RAM, workers=1)
    model = open_model(folder)
    json.dumps(description(model))
    plan = plan_conversion(model, target, to, options)  # type: ignore[arg-type]
    json.dumps(plan.to_json())
    execute(plan)
    result = target
    if to != "hf":
        result = target.with_name(target.name + "-and-back")
        execute(plan_conversion(open_model(target), result, "hf", options))
    found = {name: t for file in sorted(result.glob("*.safetensors")) for name, t in load_file(file).items()}
    return model, found, json.loads((result / "config.json").read_text())


def _judged(folder: Path, target: Path, source: Source, peaks: list[int]) -> Verdict:
    model, found, config = converted(folder, target, source.to)
    peaks.append(_peak())  # the reference reader takes what it is asked for
    try:
        wrong = differences(model, folder, folder, found, config)
    except Exception as error:
        healed = target.with_name("healed")
        heal(folder, source.files, healed)
        try:
            told = differences(model, folder, healed, found, config)
        except Exception as again:  # the damage is elsewhere: nothing is left to compare with
            told = f"{type(again).__name__}: {again}"
        if told:
            return Verdict(WRONG, f"converted wrongly: {told}; the reference reader says {_told(error)}")
        return Verdict(CONVERTED, "although the reference reader refuses it")
    if wrong:
        return Verdict(WRONG, f"converted wrongly: {wrong}")
    if model.format in ("torch_dist", "torch"):
        _forget_the_peak()
        _, again, _ = converted(_resharded(model, target), target.with_name("again"), "hf")
        peaks.append(_peak())
        if told := difference(found, again):
            return Verdict(WRONG, f"resharded wrongly: {told}")
    return Verdict(CONVERTED, "")


def _resharded(model: Model, target: Path) -> Path:
    """The checkpoint in the other Megatron format, the optimizer with it."""
    other = target.with_name("resharded")
    to = "torch" if model.format == "torch_dist" else "torch_dist"
    execute(plan_reshard(model, other, to, ConvertOptions(max_ram=MAX_RAM, workers=1)))
    return other


def _message(outcome: str, message: str, folder: Path) -> Verdict:
    """A refusal has to be readable, and to name a place."""
    if len(message) > LONGEST_MESSAGE:
        return Verdict(MESSAGE, f"{len(message)} characters: {message[:200]}")
    if str(folder) not in message:
        return Verdict(MESSAGE, f"names no file: {message[:300]}")
    return Verdict(outcome, message[:300])


def _told(error: BaseException) -> str:
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if "/converters/" in f.filename or "/verbs/" in f.filename
    ]
    frames = [f for f in frames if "/tests/" not in f.filename]
    places = "; ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames[-3:])
    return f"{type(error).__name__}: {str(error)[:200]!r} at {places}"


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise LookupError(field)


def _resident() -> int:
    return _status("VmRSS:")


def _peak() -> int:
    return _status("VmHWM:")


def _forget_the_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def regular_files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())
