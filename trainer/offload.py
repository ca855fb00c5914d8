"""What layers keep for their backward pass waits in the host's memory, copied while the GPU computes.

A layer's tensors leave when the layer is done and are freed when the next one is, so two layers' are on the GPU at a
time. In the backward pass a layer's come back while the one behind it is at work. The last layer's stay: they would
come straight back. Host buffers are pinned, made in the first step and used again in all others, and order is kept by
events alone, so that a CUDA graph can hold the copies.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor

LEAST_BYTES = 1 << 20
"""Smaller tensors stay: a copy has a fixed cost, and together they are small."""
_MOST_AROUND = 4
"""A view stays if what it is a view of is so many times larger. (The values are a few parts of the packed rows.)"""


class Offload:
    """The host's side of a decoder's activations, one micro-batch after another."""

    def __init__(self, weights: Iterable[Tensor], layers: int, least_bytes: int = LEAST_BYTES) -> None:
        """`layers` is how many layers there are; `weights` are what they hold, which never leaves."""
        weights = list(weights)
        self.lanes = _Lanes(weights[0].device)
        # Autograd's hooks see detached views, so a weight is known by its memory.
        self._weights = {weight.untyped_storage().data_ptr() for weight in weights}
        self._layers, self._least_bytes = layers, least_bytes
        self._free: dict[int, list[Tensor]] = {}
        self._used: dict[int, Tensor] = {}
        self._last: _LayerTensors | None = None
        self._coming: list[Tensor] = []
        self._arrived: Any = None
        self.host_bytes = 0
        """Pinned memory that was made."""
        self.loaded_bytes = 0
        """What was copied back, in all."""

    @contextmanager
    def layer(self, number: int) -> Generator[_LayerTensors]:
        """While the layer of this number computes: `pack` and `unpack` of what this gives are autograd's hooks."""
        if not number:
            self.reclaim()
        before = self._last if number else None
        stays = number == self._layers - 1
        tensors = _LayerTensors(self, before, stays)
        yield tensors
        tensors.send()
        if before is not None:
            before.free()
        self._last = None if stays else tensors

    def may_leave(self, tensor: Tensor) -> bool:
        """Whether a tensor is an activation that is worth a copy of the memory that it is a view of."""
        storage = tensor.untyped_storage()
        is_large = tensor.nbytes >= self._least_bytes and storage.nbytes() <= _MOST_AROUND * tensor.nbytes
        return is_large and tensor.device == self.lanes.device and storage.data_ptr() not in self._weights

    def buffer(self, nbytes: int) -> Tensor:
        """Pinned memory of this size: used before, or new."""
        free = self._free.get(nbytes)
        if not free:
            self.host_bytes += nbytes
        buffer = free.pop() if free else self.lanes.pinned(nbytes)
        self._used[buffer.data_ptr()] = buffer
        return buffer

    def give_back(self, buffer: Tensor) -> None:
        """The next copy into this buffer follows those out of it: all copies stand in one line."""
        buffer = self._used.pop(buffer.data_ptr())
        self._free.setdefault(buffer.nbytes, []).append(buffer)

    def load(self, kept: list[_Kept]) -> Any:
        """Start to copy back; the mark that says when all is there.

        The new memory is held here until what is computed waits for that mark: memory that is let go is used by the
        next tensor at once, and a copy under way would write into that.
        """
        if self._coming:
            self.wait(self._arrived)
        for one in kept:
            # In the order of the computing stream, whose memory it is.
            one.on_device = torch.empty_like(one.buffer, device=self.lanes.device, pin_memory=False)
            self._coming.append(one.on_device)
            self.loaded_bytes += one.buffer.nbytes
        with self.lanes.copying():
            for one, tensor in zip(kept, self._coming, strict=True):
                tensor.copy_(one.buffer, non_blocking=True)
            self._arrived = self.lanes.mark()
        return self._arrived

    def wait(self, mark: Any) -> None:
        """What is computed from now on follows the mark of a load."""
        self.lanes.wait(mark)
        if mark is self._arrived:
            self._coming = []

    def reclaim(self) -> None:
        """Take the buffers back that no backward pass asked for: autograd also keeps what no gradient reaches."""
        for buffer in list(self._used.values()):
            self.give_back(buffer)


@dataclass(slots=True, eq=False, weakref_slot=True)
class _Kept:
    """The whole memory of a tensor and of its views, as one dim: on the GPU, in the host's buffer, or both.

    Autograd alone holds it while the layer is away. What no gradient reaches autograd drops before the backward pass.
    """

    on_device: Tensor | None
    buffer: Tensor
    wanted: int = 0


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one operation saw of it."""

    kept: _Kept
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int


class _LayerTensors:
    """What one layer keeps for its backward pass."""

    def __init__(self, offload: Offload, before: _LayerTensors | None, stays: bool) -> None:
        self._offload, self._before, self._stays = offload, before, stays
        self._kept: dict[tuple[Any, ...], _Kept] = {}
        self._left: list[_Kept] = []
        self._away: list[ref[_Kept]] = []
        self._sent: Any = None
        self._loaded: Any = None

    def pack(self, tensor: Tensor) -> Any:
        """What autograd keeps in place of a tensor."""
        if self._stays or not self._offload.may_leave(tensor):
            return tensor if self._before is None else (tensor,)
        storage = tensor.untyped_storage()
        key = (storage.data_ptr(), tensor.dtype, tensor._version)
        if (kept := self._kept.get(key)) is None:
            # Held until it is copied, so no other tensor gets its address meanwhile.
            whole = tensor.detach().as_strided((storage.nbytes() // tensor.itemsize,), (1,), 0)
            kept = _Kept(whole, self._offload.buffer(whole.nbytes).view(tensor.dtype))
            self._kept[key] = kept
        kept.wanted += 1
        return _Seen(kept, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def unpack(self, packed: Any) -> Tensor:
        """The tensor itself, waited for; the layer before this one starts to come back."""
        if isinstance(packed, Tensor):
            return packed
        if not isinstance(packed, _Seen):
            self._start_before()
            return packed[0]
        self.load()
        self._offload.wait(self._loaded)
        self._start_before()
        kept, tensor = packed.kept, packed.kept.on_device
        if tensor is None:
            raise RuntimeError("an offloaded activation was asked for more often than it was kept")
        kept.wanted -= 1
        if not kept.wanted:
            kept.on_device = None
            self._offload.give_back(kept.buffer)
        return tensor.as_strided(packed.shape, packed.strides, packed.offset)

    def send(self) -> None:
        """Start to copy to the host."""
        self._left = list(self._kept.values())
        self._kept = {}
        if not self._left:
            return  # a copying stream that nobody waits for again would be a loose end of a CUDA graph
        lanes = self._offload.lanes
        with lanes.copying():
            for kept in self._left:
                if kept.on_device is not None:
                    kept.buffer.copy_(kept.on_device, non_blocking=True)
            self._sent = lanes.mark()

    def free(self) -> None:
        """Let the GPU's memory go: what follows on the GPU waits for the copies."""
        self._offload.lanes.wait(self._sent)
        for kept in self._left:
            kept.on_device = None
        self._away = [ref(kept) for kept in self._left]
        self._left = []

    def load(self) -> None:
        """Start to copy back what is still wanted, once."""
        away, self._away = [kept for one in self._away if (kept := one()) is not None], []
        if away:  # else a copying stream that nobody waits for
            self._loaded = self._offload.load(away)

    def _start_before(self) -> None:
        if self._before is not None:
            self._before.load()
            self._before = None


class _Lanes:
    """The computing stream and a stream of copies; on a CPU there is one lane, and nothing to wait for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def copying(self) -> Generator[None]:
        """Copies that follow all that was computed so far."""
        if self._copies is not None:
            self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with nullcontext() if self._copies is None else torch.cuda.stream(self._copies):
            yield

    def mark(self) -> Any:
        """The point that the copies have reached."""
        return None if self._copies is None else self._copies.record_event()

    def wait(self, mark: Any) -> None:
        """What is computed from now on follows the mark."""
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def pinned(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._copies is not None)
