"""What a conversion learns of its source on the way: a digest of every tensor, and which numbers are not finite.

Each block that is read is shown to the witness while it is in the cache. A tensor that was read from its first byte
to its last, for one piece of the output or for many, has its digest then; what was read in another order, or not at
all, is read again at the end, from where the digest stopped.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import xxhash

from ckptbridge.converters.blocks import digest_of
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.finite import NotFinite, not_finite
from ckptbridge.converters.narrowed import Narrowing
from ckptbridge.converters.reading import read_exactly, watched
from ckptbridge.converters.tensors import Checkpoint, Extent

_BLOCK_NBYTES = 1 << 20


class Seen:
    """One source tensor: how far it was seen, and what was found in it."""

    def __init__(self, name: str, path: Path, extent: Extent, dtype: torch.dtype, *, refuse: bool) -> None:
        self.name, self.path, self.dtype = name, path, dtype
        self.begin, self.end, self.cursor = extent.offset, extent.offset + extent.nbytes, extent.offset
        self.digest: str | None = None
        self.bad: NotFinite | None = None
        self._refuse = refuse
        self._claimed = False
        self._hash = xxhash.xxh3_64()
        self._lock = threading.Lock()

    def claim(self) -> bool:
        """Whether the caller, who hashes the whole tensor for a purpose of its own, is to set the digest."""
        with self._lock:
            self._claimed = self._claimed or self.cursor == self.begin
            return self._claimed

    def feed(self, offset: int, block: memoryview) -> None:
        """Bytes of the file from `offset`, within the tensor; any that are not the next are passed over."""
        with self._lock:
            if not offset <= self.cursor < offset + len(block):
                return
            fresh = block[self.cursor - offset :]
            if len(fresh) % self.dtype.itemsize:
                return
            if not self._claimed:
                self._hash.update(fresh)
            if bad := not_finite(fresh, self.dtype):
                bad = bad.behind((self.cursor - self.begin) // self.dtype.itemsize)
                self.bad = bad if self.bad is None else self.bad + bad
                if self._refuse:
                    self._count_the_rest(self.cursor + len(fresh))
                    raise BadInputError(self.refusal())
            self.cursor += len(fresh)
            if self.cursor == self.end and not self._claimed:
                self.digest = self._hash.hexdigest()

    def _count_the_rest(self, start: int) -> None:
        buffer = memoryview(bytearray(_BLOCK_NBYTES))
        with watched(None):
            for at in range(start, self.end, _BLOCK_NBYTES):
                block = buffer[: min(_BLOCK_NBYTES, self.end - at)]
                read_exactly(self.path, at, block)
                if self.bad and (bad := not_finite(block, self.dtype)):
                    self.bad += bad

    def refusal(self) -> str:
        """Why the tensor is not taken."""
        return f"{self.path}: tensor {self.name!r} holds {self.bad}; --check-finite asks that every weight is finite"

    def finish(self) -> None:
        """Read what was not seen yet."""
        buffer = memoryview(bytearray(min(_BLOCK_NBYTES, self.end - self.cursor)))
        while self.cursor < self.end:
            block = buffer[: min(len(buffer), self.end - self.cursor)]
            read_exactly(self.path, self.cursor, block)
            self.feed(self.cursor, block)
        self.digest = self.digest or self._hash.hexdigest()


@dataclass(slots=True)
class _Shelf:
    """The tensors of one file in the order of their bytes."""

    begins: list[int] = field(default_factory=list[int])
    tensors: list[Seen] = field(default_factory=list[Seen])


class Witness:
    """Sees every block of the source that a conversion reads. With `refuse`, a number that is not finite ends it."""

    def __init__(self, sources: Checkpoint, *, refuse: bool = False) -> None:
        self.sources = sources
        self._refuse = refuse
        self._overflowed: dict[str, NotFinite] = {}
        self._counted: set[object] = set()
        self._lock = threading.Lock()
        self._seen: dict[str, Seen] = {}
        self._shelves: dict[Path, _Shelf] = {}
        self._whole: dict[Extent, Seen] = {}
        for name, tensor in sources.items():
            extents = tensor.extents()
            if extents is None or len(extents) != 1 or (path := extents[0].path) is None:
                continue
            seen = Seen(name, path, extents[0], tensor.dtype, refuse=refuse)
            self._seen[name] = seen
            self._whole[extents[0]] = seen
            self._shelves.setdefault(path, _Shelf()).tensors.append(seen)
        for shelf in self._shelves.values():
            shelf.tensors.sort(key=lambda seen: seen.begin)
            shelf.begins = [seen.begin for seen in shelf.tensors]

    def see(self, path: Path, offset: int, block: memoryview) -> None:
        """A block of a file that was just read."""
        shelf = self._shelves.get(path)
        if shelf is None:
            return
        end = offset + len(block)
        for i in range(max(0, bisect_right(shelf.begins, offset) - 1), len(shelf.tensors)):
            seen = shelf.tensors[i]
            if seen.begin >= end:
                return
            low, high = max(offset, seen.begin), min(end, seen.end)
            if low < high:
                seen.feed(low, block[low - offset : high - offset])

    def see_cast(self, narrowing: Narrowing) -> None:
        """Some of what a tensor became in a narrower dtype is not finite: counted once, where the source is finite.

        Raises BadInputError where that is to be refused.
        """
        with self._lock:  # the others wait for the count: whoever made the same rows must not be done before it
            key = tuple(narrowing.wide.extents() or ()) or id(narrowing.wide)
            if key in self._counted:
                return
            found = narrowing.counted()
            self._counted.add(key)
            if found is None:
                return
            name, path = narrowing.place()
            known = self._overflowed.get(name)
            if known is not None:  # another part of the same tensor
                count, largest = known.overflowed + found.overflowed, max(known.largest, found.largest)
                found = NotFinite(overflowed=count, largest=largest)
            self._overflowed[name] = found
        if self._refuse:
            where = f"{path}: " if path else ""
            raise BadInputError(
                f"{where}tensor {name!r} holds {found}; --check-finite asks that every weight is finite: write bf16 or "
                "fp32 (--dtype)"
            )

    def claim(self, extents: Sequence[Extent] | None) -> Seen | None:
        """The tensor that these bytes are, if they are one, and nobody began to hash it."""
        if extents is None or len(extents) != 1:
            return None
        seen = self._whole.get(extents[0])
        return seen if seen is not None and seen.claim() else None

    def digests(self) -> dict[str, str]:
        """Of the tensors that were seen whole."""
        return {name: seen.digest for name, seen in self._seen.items() if seen.digest is not None}

    def finish(self, names: Iterable[str], workers: int) -> dict[str, str]:
        """Digests of these tensors, after reading what was not seen of them."""
        with ThreadPoolExecutor(workers) as pool:
            return dict(pool.map(self._finished, names))

    def _finished(self, name: str) -> tuple[str, str]:
        seen = self._seen.get(name)
        if seen is None:
            return name, digest_of(self.sources[name])
        seen.finish()
        return name, seen.digest or ""

    def bad(self) -> Mapping[str, NotFinite]:
        """What is not finite, or will not be, by the tensor's name."""
        found = {name: seen.bad for name, seen in self._seen.items() if seen.bad is not None}
        with self._lock:
            for name, lost in self._overflowed.items():
                found[name] = lost.merged(found[name]) if name in found else lost
        return found
