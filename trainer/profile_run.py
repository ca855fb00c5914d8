"""A few steps of a run under torch's profiler: a trace for Perfetto, and a table of where each step went."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ckptbridge.converters.disk import write_file
from ckptbridge.trainer.decoder import Decoder
from ckptbridge.trainer.profile_floors import Cost, Rates
from ckptbridge.trainer.profile_parts import PARTS, marked
from ckptbridge.trainer.profile_trace import Spent, read_trace, spent

TRACE_NAME, TABLE_NAME = "trace.json.gz", "table.json"
_STEP = "step"
"""The range around a step: evaluations and checkpoints that fall between two are in the trace, and not in the table."""
_NAMES_A_PART = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class PartTime:
    """What one part of a step took, and takes at least."""

    part: str
    ms: float
    share: float
    floor_ms: float | None
    kernels: dict[str, float]
    """The slowest kernels (operations, on a CPU) in milliseconds a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Where the profiled steps went, per step."""

    steps: int
    step_ms: float
    """By the clock, with the profiler at work and every operation launched by itself."""
    busy_ms: float
    """The sum of all kernels; of operations, on a CPU."""
    rates: Rates
    parts: tuple[PartTime, ...]
    trace: str
    """The file that ui.perfetto.dev and chrome://tracing open."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """The table for a terminal."""
        yield f"{'part':<18}{'ms':>9}{'share':>8}{'floor ms':>10}{'x floor':>9}"
        for part in self.parts:
            floor = "" if not part.floor_ms else f"{part.floor_ms:>10.2f}{part.ms / part.floor_ms:>9.2f}"
            yield f"{part.part:<18}{part.ms:>9.2f}{part.share:>8.1%}{floor}".rstrip()
        floors = sum(part.floor_ms or 0 for part in self.parts)
        yield f"{'all parts':<18}{self.busy_ms:>9.2f}{1:>8.1%}{floors:>10.2f}{self.busy_ms / max(floors, 1e-9):>9.2f}"
        yield (
            f"A step took {self.step_ms:.1f} ms by the clock under the profiler, launched operation by operation "
            f"({self.steps} profiled). Floors are at {self.rates.matrix / 1e12:.3g} TFLOP/s and "
            f"{self.rates.copy / 1e12:.3g} TB/s, measured on this device."
        )


class Profiler:
    """Profiles the steps between `start` and `stop`."""

    def __init__(self, decoder: Decoder, folder: Path, rates: Rates, costs: dict[str, Cost]) -> None:
        self._folder, self._rates, self._costs = folder, rates, costs
        self._decoder, self._steps, self._seconds = decoder, 0, 0.0
        self._device = decoder.output_weight_VH.device
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        # Else torch 2.11 warns of events that a next profile would clear; there is none.
        self._profile = profile(activities=activities, acc_events=True)
        self._marked = marked(decoder)

    def start(self) -> None:
        """Steps from here on are profiled; they are to be launched operation by operation."""
        self._marked.__enter__()
        self._profile.start()

    @contextmanager
    def step(self) -> Generator[None]:
        """While a step is taken, behind which the device is waited for."""
        started = time.perf_counter()
        with record_function(_STEP):
            yield
            self._synchronize()
        self._seconds += time.perf_counter() - started
        self._steps += 1

    def stop(self) -> Profile:
        """Write the trace and the table, and return it."""
        self._synchronize()
        self._profile.stop()
        self._marked.__exit__(None, None, None)
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / TRACE_NAME
        self._profile.export_chrome_trace(str(trace))
        found = spent(read_trace(trace), within=_STEP)
        made = Profile(
            steps=self._steps,
            step_ms=self._seconds * 1e3 / self._steps,
            busy_ms=sum(found.parts.values()) / 1e3 / self._steps,
            rates=self._rates,
            parts=tuple(self._parts(found)),
            trace=str(trace),
        )
        write_file(self._folder / TABLE_NAME, json.dumps(made.to_json(), indent=1).encode())
        return made

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _parts(self, found: Spent) -> Iterator[PartTime]:
        whole = sum(found.parts.values())
        for part in PARTS:
            if part not in found.parts and part not in self._costs:
                continue
            names = {name: us for (in_part, name), us in found.names.items() if in_part == part}
            slowest = sorted(names, key=lambda name: -names[name])[:_NAMES_A_PART]
            yield PartTime(
                part=part,
                ms=found.parts.get(part, 0.0) / 1e3 / self._steps,
                share=found.parts.get(part, 0.0) / whole,
                floor_ms=self._costs[part].floor_ms(self._rates) if part in self._costs else None,
                kernels={name: names[name] / 1e3 / self._steps for name in slowest},
            )


class ProfileWindow:
    """Which steps of a run are profiled: `steps` of them from step `first` on."""

    def __init__(self, profiler: Profiler, first: int, steps: int) -> None:
        self._profiler, self._first, self._last = profiler, first, first + steps - 1
        self.profile: Profile | None = None

    @contextmanager
    def step(self, step: int) -> Generator[bool]:
        """While a step is taken; says whether it is one of those."""
        if not self._first <= step <= self._last:
            yield False
            return
        if step == self._first:
            self._profiler.start()
        with self._profiler.step():
            yield True
        if step == self._last:
            self.profile = self._profiler.stop()
