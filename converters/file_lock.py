"""Locks that end with their process, whatever ends it: a locked file, whose content says who holds it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

_NAME_NBYTES = 400
"""A host's name has at most 255."""


class HeldElsewhere(Exception):
    """Another process has the lock; the text says which, as far as is known."""


@contextmanager
def locked(path: Path) -> Generator[None]:
    """Hold a lock by a file of this name, which is there meanwhile and removed afterwards.

    A file that a killed process left is taken over. Where the file system knows no locks, nothing is locked. Raises
    HeldElsewhere while another process of this host, or of another that shares the file system, holds it, and OSError
    if the file cannot be written.
    """
    descriptor = _taken(path)
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


def remove_unheld(path: Path) -> None:
    """Remove what a killed process left. Raises HeldElsewhere while somebody holds it."""
    with locked(path):
        pass


def _taken(path: Path) -> int | None:
    """The locked file, for its name; None where there are no locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if not lock(descriptor):
                path.unlink(missing_ok=True)
                os.close(descriptor)
                return None
        except BlockingIOError:
            holder = os.pread(descriptor, _NAME_NBYTES, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise HeldElsewhere(holder) from None
        if _is_named(path, descriptor):
            holder = f"another process ({os.getpid()} on {os.uname().nodename})"
            os.pwrite(descriptor, holder.ljust(_NAME_NBYTES).encode(), 0)  # over the name of one that was killed
            return descriptor
        os.close(descriptor)  # the one that held it has just removed it


def _is_named(path: Path, descriptor: int) -> bool:
    """Whether the open file is the one that has this name now."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
