"""Output files while they are written: open, filled piece by piece, closed when every piece's CRC-32 is known."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from ckptbridge.converters.direct import SMALLEST_RUN_NBYTES, DirectFile, DirectRun, DirectWriter, open_direct
from ckptbridge.converters.disk import disk_message, reserve, write_exactly
from ckptbridge.converters.errors import StorageError
from ckptbridge.converters.finishing import Finisher
from ckptbridge.converters.output import OutputFile, Patch, Piece
from ckptbridge.converters.tasks import Outlet
from ckptbridge.converters.tensors import Extent
from ckptbridge.converters.witness import Seen

try:
    from isal.isal_zlib import crc32  # pyright: ignore[reportUnknownVariableType] - 100 GB/s a core, against zlib's 2.4
except ImportError:
    from zlib import crc32

_WORTH_WRITING = 16 << 20
"""Bytes of a piece that are handed to the disk at a time while it is copied."""


class Draft:
    """A file that is being written. Its descriptor belongs to whoever made it, and at last to the finisher."""

    direct: DirectFile | None = None

    def __init__(self, path: Path, file: OutputFile, finisher: Finisher, *, is_direct: bool = False) -> None:
        self.path, self.file = path, file
        self.crcs: dict[str, int] = {}
        self.digests = dict.fromkeys((piece.name for piece in file.pieces), "")
        self._finisher = finisher
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            try:
                if file.size:
                    reserve(self.descriptor, file.size)
            except OSError:
                os.close(self.descriptor)
                raise
        except OSError as error:
            raise StorageError(disk_message(path, error)) from error
        if is_direct and (descriptor := open_direct(path)) is not None:
            self.direct = DirectFile(path, descriptor, self.put)

    def put(self, offset: int, data: memoryview | bytes) -> None:
        try:
            write_exactly(self.descriptor, offset, data)
        except OSError as error:
            raise StorageError(disk_message(self.path, error)) from error

    def begin_to_write(self, offset: int, nbytes: int) -> None:
        """These bytes will not change any more."""
        self._finisher.begin(self.descriptor, offset, nbytes)

    def close(self) -> None:
        """Every piece is there: put what depends on their CRCs."""
        direct, self.direct = self.direct, None
        if direct is not None:
            direct.close()
        last: Sequence[Patch] = self.file.closing(self.crcs) if self.file.closing else ()
        for offset, data in (*self.file.patches, *last):
            self.put(offset, data)

    def abandon(self) -> None:
        """It will not be whole."""
        direct, self.direct = self.direct, None
        if direct is not None:
            direct.abandon()
        self._finisher.abandon(self.descriptor)


class _Place:
    """One piece that is being filled, in order."""

    def __init__(self, draft: Draft, piece: Piece, direct: DirectWriter | None) -> None:
        self.draft, self.piece = draft, piece
        self._direct = direct
        self._run: DirectRun | None = None
        self._at = self._handed_over = 0

    def put(self, block: memoryview) -> None:
        """The next bytes."""
        if not self._at and self._direct and self.draft.direct and self.piece.tensor.nbytes >= SMALLEST_RUN_NBYTES:
            self._run = self._direct.run(self.draft.direct, self.piece.offset, self.piece.tensor.nbytes)
        if self._run is not None:
            self._run.put(block)
        else:
            self.draft.put(self.piece.offset + self._at, block)
        self._at += len(block)
        if self._run is None and self._at - self._handed_over >= _WORTH_WRITING:
            self._hand_over()

    def end(self) -> None:
        """All bytes were put."""
        if self._run is not None and self._direct is not None:
            self._direct.end(self._run)
        else:
            self._hand_over()

    def _hand_over(self) -> None:
        self.draft.begin_to_write(self.piece.offset + self._handed_over, self._at - self._handed_over)
        self._handed_over = self._at


class Stream:
    """The bytes of one tensor on their way to its places, in order; hashed once, however many places there are."""

    def __init__(
        self, outlet: Outlet, drafts: Sequence[Draft], advance: Callable[[int], None], direct: DirectWriter | None
    ) -> None:
        self.tensor = outlet.tensor
        self.seen: Seen | None = None
        """The source tensor that this is, byte for byte, if its digest is to be taken from here."""
        self._places = [_Place(drafts[number], piece, direct) for number, piece in outlet.places]
        self._advance = advance
        self._crc = 0
        self._digest: Any = xxhash.xxh3_64()

    def put(self, block: memoryview) -> None:
        """The next bytes."""
        self._crc = crc32(block, self._crc)
        self._digest.update(block)
        for place in self._places:
            place.put(block)
        self._advance(len(block) * len(self._places))

    def end(self) -> None:
        """All bytes were put."""
        digest = self._digest.hexdigest()
        for place in self._places:
            draft, piece = place.draft, place.piece
            place.end()
            for offset, data in piece.frame(self._crc) if piece.frame else ():
                draft.put(offset, data)
            draft.crcs[piece.name], draft.digests[piece.name] = self._crc, digest
        if self.seen is not None:
            self.seen.digest = digest


def in_source_order(moved: Sequence[tuple[Stream, Sequence[Extent]]]) -> Iterator[tuple[Stream, Extent]]:
    """The extents of several tensors as they follow each other in the source, where each tensor's stay in order.

    So a matrix that is taken apart is read from its first byte to its last, and its digest needs no second pass.
    """
    paths: dict[Path | None, int] = {}
    for _, extents in moved:
        for extent in extents:
            paths.setdefault(extent.path, len(paths))
    apart = [
        ((paths[extent.path], extent.offset), number, place)
        for number, (_, extents) in enumerate(moved)
        for place, extent in enumerate(extents)
    ]
    ordered = sorted(apart)
    at = [0] * len(moved)
    for _, number, place in ordered:
        if place != at[number]:
            ordered = apart
            break
        at[number] += 1
    for _, number, place in ordered:
        yield moved[number][0], moved[number][1][place]
