"""Reading bytes of files, with whoever wants to see them looking on."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from ckptbridge.converters.errors import BadInputError, StorageError

See = Callable[[Path, int, memoryview], None]
"""Called with (file, offset, the bytes that were read there)."""
_watch = threading.local()


@contextmanager
def watched(see: See | None) -> Generator[None]:
    """Within it, `see` is told of everything that this thread reads: a digest of the source needs no second pass."""
    before = getattr(_watch, "see", None)
    _watch.see = see
    try:
        yield
    finally:
        _watch.see = before


def read_exactly(path: Path, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` from a file. Raises BadInputError if the file ends first, StorageError if it cannot be read."""
    read_strided(path, offset, 0, 1, buffer)


def read_strided(path: Path, offset: int, stride: int, count: int, buffer: memoryview) -> None:
    """Fill `buffer` with `count` runs of equal length, each beginning `stride` bytes behind the one before it.

    Raises as `read_exactly` does.
    """
    whole = buffer.cast("B")
    nbytes = len(whole) // count
    see: See | None = getattr(_watch, "see", None)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for number in range(count):
                view, at = whole[number * nbytes : (number + 1) * nbytes], offset + number * stride
                _fill(descriptor, path, at, view)
                if see:
                    see(path, at, view)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from error


def _fill(descriptor: int, path: Path, offset: int, view: memoryview) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise BadInputError(
                f"{path}: the file ends at byte {offset + done}, but bytes {offset} to "
                f"{offset + len(view)} are needed: it is truncated; copy or download it again"
            )
        done += count
