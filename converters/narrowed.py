"""Casts to a dtype whose numbers end sooner, as fp16's do at 65504: a finite weight beyond becomes infinite.

Only such casts are looked at, block by block as they are made, while the block is in the cache.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ckptbridge.converters.blocks import bytes_of
from ckptbridge.converters.finite import NotFinite, not_finite
from ckptbridge.converters.reading import watched
from ckptbridge.converters.tasks import leaves
from ckptbridge.converters.tensors import Checkpoint, LazyTensor, RowMap, Rows, cast

_COUNTED_NBYTES = 1 << 20
_watch = threading.local()


@dataclass(frozen=True, slots=True, kw_only=True)
class Narrowing:
    """A tensor, and what it is in a dtype that ends sooner. `own` is the model's parameter that it is a part of."""

    wide: LazyTensor
    made: LazyTensor
    own: str
    sources: Checkpoint

    def place(self) -> tuple[str, Path | None]:
        """(name, file) of the source tensor that it is stored as; its own name where it is made of several."""
        first, *others = leaves(self.wide) or (self.wide,)
        at = (first.extents() or (None,))[0]
        if at is None or at.path is None or (others and first.dtype == self.wide.dtype):
            return self.own, None
        for name, tensor in self.sources.items():
            for extent in tensor.extents() or ():
                if extent.path == at.path and extent.offset <= at.offset < extent.offset + extent.nbytes:
                    return name, at.path
        return self.own, None

    def counted(self) -> NotFinite | None:
        """How many finite numbers of the whole tensor become infinite; None for none."""
        count, largest = 0, 0.0
        height = self.wide.shape[0] if self.wide.shape else 1
        step = max(1, _COUNTED_NBYTES // max(1, self.wide.work_row_nbytes + self.made.work_row_nbytes))
        with watched(None):
            for start in range(0, height, step):
                end = min(height, start + step)
                wide, made = self.wide.read_rows(start, end), self.made.read_rows(start, end)
                lost = wide[wide.isfinite() & made.isinf()]
                if lost.numel():
                    count += lost.numel()
                    largest = max(largest, lost.abs().max().item())
        return NotFinite(overflowed=count, largest=largest) if count else None


Tell = Callable[[Narrowing], None]


@contextmanager
def casts_watched(tell: Tell) -> Generator[None]:
    """Within it, `tell` is called with each narrowing of which this thread makes rows that are not finite."""
    before = getattr(_watch, "tell", None)
    _watch.tell = tell
    try:
        yield
    finally:
        _watch.tell = before


def narrowed(tensor: LazyTensor, dtype: torch.dtype, own: str, sources: Checkpoint) -> LazyTensor:
    """The tensor in another dtype, watched if that ends sooner. Errors call it by its source's name, or by `own`."""
    made = cast(tensor, dtype)
    if not _ends_sooner(dtype, tensor.dtype):
        return made
    if not (isinstance(tensor, Rows) and isinstance(made, Rows)):
        return _looked_at(Narrowing(wide=tensor, made=made, own=own, sources=sources))
    parts = {  # each by itself: rows of the source stay rows of the source, and are shared as before
        id(part): _looked_at(Narrowing(wide=wide, made=part, own=own, sources=sources))
        for (wide, _, _), (part, _, _) in zip(tensor.pieces, made.pieces, strict=True)
    }
    return Rows([(parts[id(part)], start, stop) for part, start, stop in made.pieces], made.shape[1:], dtype)


def _ends_sooner(dtype: torch.dtype, than: torch.dtype) -> bool:
    """Of bf16, which ends 0.4 % before fp32, nothing is lost that anybody trained."""
    return torch.finfo(dtype).max < 0.5 * torch.finfo(than).max


def _looked_at(narrowing: Narrowing) -> LazyTensor:
    made = narrowing.made

    def look(rows: Tensor) -> Tensor:
        tell: Tell | None = getattr(_watch, "tell", None)
        if tell is not None and not_finite(bytes_of(rows), made.dtype):
            tell(narrowing)
        return rows

    return RowMap(made, made.shape, made.dtype, look, 0, is_elementwise=True)
