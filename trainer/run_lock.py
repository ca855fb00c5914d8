"""One process at a time in a run folder: two would mix their logs and delete each other's checkpoints."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.file_lock import HeldElsewhere, locked

LOCK_NAME = ".lock"
"""There while a process trains in the folder, and after one that was killed; the lock itself ends with its process."""


@contextmanager
def only_one(folder: Path) -> Generator[None]:
    """Within it no other process, of this host or of another that shares the file system, trains in `folder`.

    Where the file system knows no locks, nothing is locked. Raises BadInputError if another process is there, and
    OSError if the folder cannot be written.
    """
    lock = locked(folder / LOCK_NAME)
    try:
        lock.__enter__()
    except HeldElsewhere as holder:
        raise BadInputError(
            f"{folder}: {holder} trains in this folder already; wait for it, end it, or name another run_folder"
        ) from None
    try:
        yield
    finally:
        lock.__exit__(None, None, None)
