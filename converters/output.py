"""What a conversion will write: every file, every byte range, before a tensor is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ckptbridge.converters.tensors import LazyTensor

Patch = tuple[int, bytes]
"""(offset in the file, bytes to put there)"""


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor's bytes at `offset` of a file. `frame(crc)` is what stands around them, once their CRC-32 is known."""

    name: str
    offset: int
    tensor: LazyTensor
    frame: Callable[[int], Sequence[Patch]] | None = None


@dataclass(slots=True)
class OutputFile:
    """A file of the output: `size` bytes, made of tensors and of bytes that are known already."""

    name: str
    size: int = 0
    pieces: list[Piece] = field(default_factory=list[Piece])
    patches: list[Patch] = field(default_factory=list[Patch])
    closing: Callable[[Mapping[str, int]], Sequence[Patch]] | None = None
    """What can be written only when the CRC-32 of every piece is known, by the pieces' names: a zip's directory."""

    @property
    def tensor_nbytes(self) -> int:
        return sum(piece.tensor.nbytes for piece in self.pieces)
