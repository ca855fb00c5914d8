"""Several processes that share one conversion, on one machine or many, and meet in the file system alone.

Each rank keeps a small file beside the partial folder: who it is, how far it came, and a beat that counts on while it
lives. Files of an earlier run that died cannot be mistaken for this one's: rank 0 takes a rank for present only when
it echoes rank 0's token of this run, and a rank begins only when rank 0 names the rank's own token.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock, Thread
from types import TracebackType
from typing import Any

from ckptbridge.converters.disk import PARTIAL_SUFFIX
from ckptbridge.converters.errors import BadInputError, StorageError

_SPECIAL_STEPS = 4_294_967_280
"""Slurm numbers its own steps from the top of 32 bits: batch, extern, interactive. They run one process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """This process among those that do one conversion. `patience` is how many seconds of silence mean death."""

    rank: int = 0
    world_size: int = 1
    patience: float = 120.0


def this_rank(environment: Mapping[str, str] | None = None) -> Rank:
    """Who this process is under torchrun (RANK, WORLD_SIZE) or srun; alone where neither started it.

    A shell of salloc or sbatch has SLURM_PROCID and SLURM_NTASKS too, but runs one process: only a step of srun's,
    which SLURM_STEP_ID numbers, counts. Raises BadInputError when the numbers contradict each other.
    """
    known = os.environ if environment is None else environment
    if "RANK" in known and "WORLD_SIZE" in known:
        return _rank(known, "RANK", "WORLD_SIZE")
    step = known.get("SLURM_STEP_ID", "")
    if step.isdigit() and int(step) < _SPECIAL_STEPS and "SLURM_PROCID" in known and "SLURM_STEP_NUM_TASKS" in known:
        return _rank(known, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    return Rank()


def _rank(known: Mapping[str, str], rank: str, world_size: str) -> Rank:
    if not (known[rank].isdigit() and known[world_size].isdigit() and int(known[rank]) < int(known[world_size])):
        raise BadInputError(
            f"the environment says {rank}={known[rank]} and {world_size}={known[world_size]}: a rank must be a number "
            "below the number of ranks; unset both to convert in one process"
        )
    return Rank(rank=int(known[rank]), world_size=int(known[world_size]))


def split_by_nbytes(sizes: Iterable[int], ranks: int) -> list[int]:
    """The rank of each item, so that all have about the same bytes: the largest first, to whoever has least."""
    nbytes = list(sizes)
    loads, owners = [0] * ranks, [0] * len(nbytes)
    for item in sorted(range(len(nbytes)), key=lambda item: -nbytes[item]):
        owners[item] = loads.index(min(loads))
        loads[owners[item]] += nbytes[item]
    return owners


def rank_files(target: Path) -> list[Path]:
    """What ranks left beside a target."""
    stem = f"{target.name}{PARTIAL_SUFFIX}.rank-"
    return [path for path in target.parent.iterdir() if path.name.startswith(stem)] if target.parent.is_dir() else []


class Fellows:
    """The ranks of one conversion. Entering it says that this one is there; leaving it by an error says that.

    Every wait raises StorageError naming the rank when one fails, or is silent for longer than the patience.
    """

    def __init__(self, me: Rank, target: Path) -> None:
        self.me, self._target = me, target
        self._state: dict[str, Any] = {"token": uuid.uuid4().hex, "beat": 0, "stage": 0}
        self._lock = Lock()
        self._left = Event()
        self._thread = Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Fellows:
        if self.me.world_size > 1:
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._tell()
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.me.world_size == 1:
            return
        self._left.set()
        self._thread.join()
        if error is not None:
            with suppress(OSError):  # the disk may be what failed: the others then see that this rank is silent
                self._tell(failed=f"{type(error).__name__}: {error}")

    def gather(self) -> None:
        """Rank 0: wait until every rank of this run is there."""

        def admit(state: dict[str, Any]) -> bool:
            if state.get("echo") != self._state["token"]:
                return False
            self._tell(tokens=[*self._state.get("tokens", ()), state.get("token")])
            return True

        self._wait(range(1, self.me.world_size), admit, "waiting for it to begin")

    def share(self, value: Mapping[str, Any]) -> None:
        """Rank 0: let the others begin, and tell them this."""
        if self.me.world_size > 1:
            self._tell(shared=value)

    def shared(self) -> dict[str, Any]:
        """Another rank: what rank 0 shares, once it has seen this rank."""

        def admitted(state: dict[str, Any]) -> bool:
            if state.get("token") != self._state.get("echo"):
                self._tell(echo=state.get("token"))
            return "shared" in state and self._state["token"] in state.get("tokens", ())

        self._wait((0,), admitted, "waiting for it to prepare the folder")
        return (self._read(0) or {}).get("shared", {})

    def reach(self, stage: int, what: str) -> None:
        """Come to a stage, and wait until all others have."""
        if self.me.world_size > 1:
            self._tell(stage=stage)
            others = [rank for rank in range(self.me.world_size) if rank != self.me.rank]
            self._wait(others, lambda state: state.get("stage", 0) >= stage, what)

    def wait_for_first(self, stage: int, what: str) -> None:
        """Wait until rank 0 has come to a stage."""
        self._wait((0,), lambda state: state.get("stage", 0) >= stage, what)

    def dismiss(self, stage: int) -> None:
        """Rank 0: all is done. Wait until the others have seen it, at most as long as the patience, and clean up."""
        if self.me.world_size > 1:
            self._tell(stage=stage)
            end = time.monotonic() + self.me.patience
            while time.monotonic() < end and any(self._file(rank).exists() for rank in range(1, self.me.world_size)):
                time.sleep(0.02)
            self._left.set()
            self._thread.join()
        for path in rank_files(self._target):
            path.unlink(missing_ok=True)

    def leave(self) -> None:
        """Another rank: the end of the run was seen."""
        self._left.set()
        self._thread.join()
        self._file(self.me.rank).unlink(missing_ok=True)

    def _wait(self, ranks: Iterable[int], done: Callable[[dict[str, Any]], bool], what: str) -> None:
        waiting = set(ranks)
        last: dict[int, Any] = {}
        heard = dict.fromkeys(waiting, time.monotonic())
        while waiting:
            for rank in sorted(waiting):
                state = self._read(rank)
                if state is not None and done(state):
                    waiting.discard(rank)
                elif state is not None and state.get("failed") and self._is_of_this_run(rank, state):
                    raise StorageError(f"rank {rank} of {self.me.world_size} failed: {state['failed']}")
                elif state != last.get(rank):
                    last[rank], heard[rank] = state, time.monotonic()
                elif time.monotonic() - heard[rank] > self.me.patience:
                    raise StorageError(
                        f"rank {rank} of {self.me.world_size} gave no sign of life for {self.me.patience:.0f} s, "
                        f"{what} ({self._file(rank)}); what was written is kept: start all ranks again with --resume"
                    )
            if waiting:
                time.sleep(0.02)

    def _is_of_this_run(self, rank: int, state: dict[str, Any]) -> bool:
        if rank == 0:
            return self._state["token"] in state.get("tokens", ())
        return state.get("echo") == self._state["token" if self.me.rank == 0 else "echo"]

    def _beat(self) -> None:
        while not self._left.wait(min(2.0, self.me.patience / 8)):
            with suppress(OSError):
                self._tell(beat=self._state["beat"] + 1)

    def _tell(self, **changes: Any) -> None:
        with self._lock:
            self._state |= changes
            path = self._file(self.me.rank)
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_text(json.dumps(self._state))
            temporary.replace(path)

    def _read(self, rank: int) -> dict[str, Any] | None:
        try:
            return json.loads(self._file(rank).read_text())
        except (OSError, ValueError):
            return None

    def _file(self, rank: int) -> Path:
        return self._target.with_name(f"{self._target.name}{PARTIAL_SUFFIX}.rank-{rank}")
