"""Where the time of a profiled run went, read from the trace that the profiler wrote.

A kernel belongs to what its launch stood in. In a backward pass that is found through the forward operation whose
gradient it computes: both carry the number that autograd gave them.
"""

from __future__ import annotations

import gzip
import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptbridge.trainer.profile_parts import part_of

_ON_HOST = ("cpu_op", "user_annotation")
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_NUMBER, _FORWARD_THREAD = "Sequence number", "Fwd thread id"


@dataclass(slots=True)
class _Span:
    """Something that ran on the host, in whatever it ran in."""

    name: str
    start: float
    end: float
    number: int
    is_backward: bool
    in_backward: bool = False
    """Itself or what it ran in belongs to a backward pass."""
    outer: _Span | None = None
    inner: float = 0.0
    """Microseconds of what ran in it directly."""


@dataclass(slots=True)
class Spent:
    """Microseconds by part, and by part and name."""

    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    names: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))

    def add(self, part: str, name: str, microseconds: float) -> None:
        self.parts[part] += microseconds
        self.names[part, name] += microseconds


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events of a Chrome trace, packed with gzip or not."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        return json.load(file)["traceEvents"]


def spent(events: Iterable[dict[str, Any]], within: str | None = None) -> Spent:
    """Time on the device by part; on the host itself where the trace has no device.

    With `within` of ranges of that name alone: of what ran in them, in any thread, and of kernels launched meanwhile.
    """
    events = [event for event in events if event.get("ph") == "X"]
    hosted = [event for event in events if event["cat"] in _ON_HOST]
    ranges = sorted((event["ts"], event["ts"] + event["dur"]) for event in hosted if event["name"] == within)

    def counts(event: dict[str, Any]) -> bool:
        at = bisect_right(ranges, event["ts"], key=lambda span: span[0]) - 1
        return within is None or (at >= 0 and event["ts"] < ranges[at][1])

    threads = _spans(event for event in hosted if counts(event))
    forward = _forward_by_number(threads)
    launches = {_correlation(event): event for event in events if event["cat"] in _LAUNCHES}
    total = Spent()
    kernels = [event for event in events if event["cat"] in _ON_DEVICE]
    for kernel in kernels:
        launch = launches.get(_correlation(kernel))
        if not counts(launch or kernel):
            continue
        span = None if launch is None else _span_at(threads.get(launch["tid"], []), launch["ts"])
        total.add(part_of(kernel["name"], list(_around(span, forward))), kernel["name"], kernel["dur"])
    if not kernels:
        for spans in threads.values():
            for span in spans:
                part = part_of(span.name, list(_around(span, forward)))
                total.add(part, span.name, span.end - span.start - span.inner)
    return total


def _spans(events: Iterable[dict[str, Any]]) -> dict[Any, list[_Span]]:
    """By thread, in order of their start; each knows what it ran in."""
    threads: dict[Any, list[_Span]] = defaultdict(list)
    open_spans: dict[Any, list[_Span]] = defaultdict(list)
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        args = event.get("args", {})
        is_backward = bool(args.get(_FORWARD_THREAD)) or event["name"].startswith("autograd::engine")
        span = _Span(event["name"], event["ts"], event["ts"] + event["dur"], args.get(_NUMBER, -1), is_backward)
        span.in_backward = is_backward
        stack = open_spans[event["tid"]]
        while stack and stack[-1].end <= span.start:
            stack.pop()
        if stack:
            span.outer, span.in_backward = stack[-1], span.in_backward or stack[-1].in_backward
            stack[-1].inner += event["dur"]
        stack.append(span)
        threads[event["tid"]].append(span)
    return threads


def _forward_by_number(threads: dict[Any, list[_Span]]) -> dict[int, _Span]:
    """The operation that autograd remembers under a number: the last one that saw it as the next to be given.

    Numbers are counted by each thread for itself, and forward passes are in one; what backward passes run has others.
    """
    found: dict[int, _Span] = {}
    for spans in threads.values():
        for span in spans:
            if span.number >= 0 and not span.in_backward:
                found[span.number] = span
    return found


def _span_at(spans: list[_Span], time: float) -> _Span | None:
    """The innermost span that is open at a time."""
    at = bisect_right(spans, time, key=lambda span: span.start) - 1
    span = spans[at] if at >= 0 else None
    while span is not None and span.end < time:
        span = span.outer
    return span


def _around(span: _Span | None, forward: dict[int, _Span]) -> Iterator[str]:
    """Names of a span and of what it ran in, the innermost first; behind a backward operation its forward one's."""
    seen: set[int] = set()
    while span is not None:
        yield span.name.removesuffix("Backward") if span.is_backward else span.name
        crossing = forward.get(span.number) if span.is_backward and span.number not in seen else None
        if crossing is not None and span.name.startswith("autograd::engine"):
            seen.add(span.number)
            span = crossing
        else:
            span = span.outer


def _correlation(event: dict[str, Any]) -> Any:
    return event.get("args", {}).get("correlation")
