"""What a memory checker and a race checker find on a GPU, found by Triton's interpreter: who may touch what, and when.

Of every launch each load and store is looked at, element by element:

- no access outside the memory of the launch's own tensors (a view counts as what it spans, not as its buffer);
- no element written by two programs, and none read by one program and written by another: programs run in any order;
- no element written twice by one store with two values: lanes run in any order.

Atomics may meet: of them only the place is checked. Numbers that nobody wrote are the business of `poison.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

_NOBODY, _SEVERAL = -1, -2


class Launch:
    """The memory of one launch's tensors, and which program read and wrote each byte at which an element begins."""

    def __init__(self, kernel: str, tensors: list[Tensor]) -> None:
        self.kernel, self.program = kernel, _NOBODY
        spans = sorted((tensor.data_ptr(), tensor.data_ptr() + _span(tensor)) for tensor in tensors if tensor.numel())
        merged: list[list[int]] = []
        for start, end in spans:
            if merged and start < merged[-1][1]:
                merged[-1][1] = max(end, merged[-1][1])
            else:
                merged.append([start, end])
        self.starts = np.array([start for start, _ in merged], dtype=np.uint64)
        self.ends = np.array([end for _, end in merged], dtype=np.uint64)
        # All spans side by side in one array.
        sizes = self.ends - self.starts
        self.firsts = np.cumsum(sizes) - sizes
        self.writers = np.full(int(sizes.sum()), _NOBODY, dtype=np.int32)
        self.readers = np.full(int(sizes.sum()), _NOBODY, dtype=np.int32)

    def read(self, addresses: np.ndarray, itemsize: int) -> None:
        places = self._places(addresses, itemsize, "reads")
        writers, readers = self.writers[places], self.readers[places]
        self._refuse_other((writers != _NOBODY) & (writers != self.program), "reads what program {} wrote", writers)
        mine = np.where((readers == _NOBODY) | (readers == self.program), self.program, _SEVERAL)
        self.readers[places] = mine

    def write(self, addresses: np.ndarray, itemsize: int, values: np.ndarray) -> None:
        places = self._places(addresses, itemsize, "writes")
        writers, readers = self.writers[places], self.readers[places]
        self._refuse_other((writers != _NOBODY) & (writers != self.program), "writes what program {} wrote", writers)
        self._refuse_other((readers != _NOBODY) & (readers != self.program), "writes what program {} read", readers)
        self.writers[places] = self.program
        order = np.argsort(places, kind="stable")
        again = np.diff(places[order]) == 0
        bits = values.view(f"u{values.dtype.itemsize}")[order]
        if (again & (bits[1:] != bits[:-1])).any():
            raise AssertionError(f"{self.kernel}: program {self.program} writes two values to one element in one store")

    def touch(self, addresses: np.ndarray, itemsize: int) -> None:
        """An atomic access."""
        self._places(addresses, itemsize, "adds to")

    def _places(self, addresses: np.ndarray, itemsize: int, verb: str) -> np.ndarray:
        spans = np.searchsorted(self.starts, addresses, side="right") - 1
        outside = spans < 0
        if len(self.starts):
            outside |= addresses + np.uint64(itemsize) > self.ends[spans]
        if outside.any():
            place = int(addresses[outside][0])
            distances = [
                f"{place - int(end)} bytes behind" if place >= int(start) else f"{int(start) - place} bytes before"
                for start, end in zip(self.starts, self.ends, strict=True)
            ]
            nearest = min(distances, key=lambda text: int(text.split()[0]), default="with no tensor given,")
            raise AssertionError(
                f"{self.kernel}: program {self.program} {verb} {int(outside.sum())} elements outside its tensors, "
                f"the first {nearest} one"
            )
        return (addresses - self.starts[spans] + self.firsts[spans]).astype(np.int64)

    def _refuse_other(self, others: np.ndarray, deed: str, programs: np.ndarray) -> None:
        if others.any():
            other = int(programs[others][0])
            deed = deed.format("of several" if other == _SEVERAL else other)
            raise AssertionError(f"{self.kernel}: program {self.program} {deed} in the same launch")


def _span(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to behind its last."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.element_size()


def _tensors(arguments: Any) -> Iterator[Tensor]:
    """All tensors among a kernel's arguments, those of descriptors too."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from _tensors(argument)
        elif hasattr(argument, "base"):
            yield argument.base


@functools.cache
def check_memory() -> None:
    """From now on every launch in this process is looked at. For a process whose kernels are interpreted."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    launches: list[Launch] = []

    def before(owner: Any, name: str, look: Callable[..., None]) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def run(self: Any, *arguments: Any, **keywords: Any) -> Any:
            look(self, *arguments)
            return original(self, *arguments, **keywords)

        setattr(owner, name, run)

    def unmasked(pointers: Any, mask: Any) -> tuple[np.ndarray, int, np.ndarray]:
        chosen = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        return pointers.data[chosen].ravel(), pointers.get_element_ty().primitive_bitwidth // 8, chosen

    def look_at_load(self: Any, pointers: Any, mask: Any, *_: Any) -> None:
        addresses, itemsize, _ = unmasked(pointers, mask)
        launches[-1].read(addresses, itemsize)

    def look_at_store(self: Any, pointers: Any, value: Any, mask: Any, *_: Any) -> None:
        addresses, itemsize, chosen = unmasked(pointers, mask)
        launches[-1].write(addresses, itemsize, np.broadcast_to(value.data, chosen.shape)[chosen].ravel())

    def look_at_atomic(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *_: Any) -> None:
        addresses, itemsize, _ = unmasked(pointers, mask)
        launches[-1].touch(addresses, itemsize)

    def look_at_program(self: Any, x: int, y: int, z: int) -> None:
        _, height, depth = self.grid_dim
        launches[-1].program = (x * height + y) * depth + z

    before(builder, "create_masked_load", look_at_load)
    before(builder, "create_masked_store", look_at_store)
    before(builder, "create_atomic_rmw", look_at_atomic)
    before(builder, "set_grid_idx", look_at_program)

    make_arguments, call = executor._init_args_hst, executor.__call__

    def remembered(self: Any, arguments: Any, keywords: Any) -> Any:
        made = make_arguments(self, arguments, keywords)
        positional, named = made
        launches.append(Launch(self.fn.__name__, list(_tensors([*positional, *named.values()]))))
        return made

    def launched(self: Any, *arguments: Any, **keywords: Any) -> Any:
        depth = len(launches)
        try:
            return call(self, *arguments, **keywords)
        finally:
            del launches[depth:]

    executor._init_args_hst, executor.__call__ = remembered, launched
