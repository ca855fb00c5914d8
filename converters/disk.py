"""What a conversion asks of the disk: space beforehand, whole writes, names that change at once, and errors told.

A folder that ends with `.partial` is unfinished work.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import shutil
from pathlib import Path
from typing import Any

from ckptbridge.converters.errors import StorageError

PARTIAL_SUFFIX = ".partial"
"""What a folder's name ends with until it is whole."""


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, not only the files' bytes."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_EXCHANGE = 2
"""renameat2's RENAME_EXCHANGE: two names swap what they name, and at no moment is either missing."""


def take_name(partial: Path, target: Path) -> None:
    """Give a finished folder its name; one that it replaces is removed after that. Raises OSError.

    On Linux the two change places in one step; elsewhere the old one is set aside as `.replaced` first, or by a name
    with a number behind that where somebody has it.
    """
    if not target.exists():
        partial.rename(target)
        sync_folder(target.parent)
        return
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        here = -100  # AT_FDCWD
        swapped = libc.renameat2(here, os.fsencode(partial), here, os.fsencode(target), _EXCHANGE) == 0
    except (OSError, AttributeError):
        swapped = False
    old = partial
    if not swapped:
        names = (target.with_name(f"{target.name}.replaced{number or ''}") for number in itertools.count())
        old = next(path for path in names if not path.exists())
        target.rename(old)
        partial.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(old)


def write_file(path: Path, data: bytes) -> None:
    """Write a small file whole, durably and under its name at once. Raises StorageError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise StorageError(disk_message(path, error)) from error


def reserve(descriptor: int, size: int) -> None:
    """Take the space now: a full disk shows before the work, and the blocks lie together."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, size)


def write_exactly(descriptor: int, offset: int, data: memoryview | bytes) -> None:
    """Write all of the data. Raises OSError."""
    view: Any = memoryview(data)
    while len(view):
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def disk_message(path: Path, error: OSError) -> str:
    """What to tell of a failed write, with the folder where the work so far lies."""
    partial = next((p for p in (path, *path.parents) if p.name.endswith(PARTIAL_SUFFIX)), None)
    left = f". What was written lies in {partial}" if partial else ""
    if error.errno == errno.ENOSPC:
        return (
            f"{path}: the disk is full{left}: free some space and run again; conversions continue with --resume, a "
            "training run of the same recipe by itself"
        )
    return f"{path}: cannot be written: {error.strerror}{left}"
