"""Making written files durable while the next ones are written: one thread, what it is given in order.

A disk that is told early what to write is done when the last byte is handed over; asked only by fsync, it begins
then. Both calls wait for the disk, so that neither belongs into a thread that copies.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any

from ckptbridge.converters.errors import StorageError

_WRITE = 2
"""SYNC_FILE_RANGE_WRITE: begin to write these pages, do not wait for them."""


class Finisher:
    """Owns the descriptors that it is given: syncs, closes, and then tells. Leaving it waits for all of them.

    Leaving it, and `check`, raise StorageError naming the first file that could not be synced.
    """

    def __init__(self, message: Callable[[Path, OSError], str]) -> None:
        self._message = message
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._failed: Exception | None = None
        self._hurries = False
        self._thread = Thread(target=self._work, name="finisher", daemon=True)

    def __enter__(self) -> Finisher:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._hurries = error is not None
        self._jobs.put(None)
        self._thread.join()
        if error is None:
            self.check()

    def check(self) -> None:
        """Raise what went wrong so far."""
        if self._failed is not None:
            raise self._failed

    def begin(self, descriptor: int, offset: int, nbytes: int) -> None:
        """These bytes are written: let them go to the disk."""
        self._jobs.put(lambda: None if self._hurries else _begin_to_write(descriptor, offset, nbytes))

    def finish(self, descriptor: int, path: Path, then: Callable[[], None]) -> None:
        """Sync and close a file that is written whole; `then` is called when it is durable."""
        self._jobs.put(lambda: self._finish(descriptor, path, then))

    def abandon(self, descriptor: int) -> None:
        """Close a file that will not be whole."""
        self._jobs.put(lambda: os.close(descriptor))

    def _finish(self, descriptor: int, path: Path, then: Callable[[], None]) -> None:
        try:
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StorageError(self._message(path, error)) from error
        then()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception as error:
                self._failed = self._failed or error


def _begin_to_write(descriptor: int, offset: int, nbytes: int) -> None:
    if _sync_file_range is not None:
        _sync_file_range(descriptor, ctypes.c_int64(offset), ctypes.c_int64(nbytes), _WRITE)


def _from_libc(name: str) -> Any:
    """A function of the C library that Python has no name for; None where there is none."""
    return getattr(ctypes.CDLL(None, use_errno=True), name, None)


_sync_file_range = _from_libc("sync_file_range")
