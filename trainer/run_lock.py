"""One process at a time in a run folder: two would mix their logs and delete each other's checkpoints."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from ckptbridge.converters.errors import BadInputError

LOCK_NAME = ".lock"
"""There while a process trains in the folder, and after one that was killed; the lock itself ends with its process."""


@contextmanager
def only_one(folder: Path) -> Generator[None]:
    """Within it no other process, of this host or of another that shares the file system, trains in `folder`.

    Where the file system knows no locks, nothing is locked. Raises BadInputError if another process is there, and
    OSError if the folder cannot be written.
    """
    path = folder / LOCK_NAME
    descriptor = _locked(path)
    try:
        yield
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)  # while it is locked: who opened it before sees that its name has gone
            os.close(descriptor)


def lock(descriptor: int) -> bool:
    """Lock an open file. False where the file system has no locks; raises BlockingIOError while another has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _locked(path: Path) -> int | None:
    """The locked file, for its name; None where there are no locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if not lock(descriptor):
                path.unlink(missing_ok=True)
                os.close(descriptor)
                return None
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise BadInputError(
                f"{path.parent}: {holder} trains in this folder already; wait for it, end it, or name another "
                "run_folder"
            ) from None
        if _is_named(path, descriptor):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"another process ({os.getpid()} on {socket.gethostname()})\n".encode(), 0)
            return descriptor
        os.close(descriptor)  # the one that held it has just removed it


def _is_named(path: Path, descriptor: int) -> bool:
    """Whether the open file is the one that has this name now."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
