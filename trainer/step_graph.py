"""A whole training step as one CUDA graph: captured once, then replayed, so that the GPU never waits for Python."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

import torch

R = TypeVar("R")
_WAITS = "called a synchronizing CUDA operation"
EAGER_CALLS = 2
"""Calls before the capture. The first compiles kernels and fills caches, the second is watched for waits."""


class StepGraph(Generic[R]):
    """Calls a function that reads and writes the same device memory each time, sooner or later as a CUDA graph.

    The first two calls run as they are, on the stream of the capture: they are steps like any other, so that nothing
    has to be taken back. The third captures and every call from then on replays. A function that makes the host wait
    for the device cannot be captured: the second call finds that out, and all calls stay as they are.

    What a call returns is the same object each time once it is captured, and its tensors are overwritten.
    """

    def __init__(self, function: Callable[[], R], device: torch.device, forget: Callable[[], None]) -> None:
        """`forget` undoes what a capture that failed has left on the host (nothing ran on the device)."""
        self._function, self._forget = function, forget
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: R
        self._calls = 0
        self.obstacle: str | None = None
        """Why there is no graph, as a clause; None as long as none is known."""

    @property
    def is_captured(self) -> bool:
        """Whether calls are replays."""
        return self._graph is not None

    def __call__(self) -> R:
        if self._graph is None and self._calls == EAGER_CALLS and self.obstacle is None:
            self._capture()
        self._calls += 1
        if self._graph is not None:
            self._graph.replay()
            return self._result
        if self._calls != EAGER_CALLS or self.obstacle is not None:
            return self.eager()
        with _watched() as found:
            result = self.eager()
        self.obstacle = _waits(found)
        return result

    def eager(self) -> R:
        """Call the function as it is, whatever has been captured."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = self._function()
        current.wait_stream(self._stream)
        return result

    def _capture(self) -> None:
        gc.collect()  # what a cycle holds of the calls before would stay beside the graph's own memory
        graph = torch.cuda.CUDAGraph()
        try:
            # Its own memory pool: what the calls before it held is given back first (torch.cuda.graph does that).
            with torch.cuda.graph(graph, stream=self._stream):
                self._result = self._function()
        except RuntimeError as error:
            torch.cuda.synchronize(self._stream.device)
            self._forget()
            self.obstacle = f"the capture failed: {str(error).strip().splitlines()[0]}"
        else:
            self._graph = graph


@contextmanager
def _watched() -> Generator[list[warnings.WarningMessage]]:
    """Collects what torch says of the host waiting for the device. (Other warnings were shown by the call before.)"""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(mode)


def _waits(found: list[warnings.WarningMessage]) -> str | None:
    """The first places where the host waited, as a clause; None if there were none."""
    waits = [warning for warning in found if _WAITS in str(warning.message)]
    places = list(dict.fromkeys(f"{Path(w.filename).name}:{w.lineno}" for w in waits))
    return f"the host waits for the GPU in {', '.join(places[:3])}" if places else None
