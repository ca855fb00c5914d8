"""A shard from the Hub to the disk: resumed where the connection was cut, and never believed before it is checked.

The Hub states the SHA-256 of every large file. It is computed while the bytes arrive, so a shard is read once; that is
why the plain HTTP endpoint is used even where hf_xet is installed, whose transfer would leave the check to a second
pass and keep a cache of its own beside the shards.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from pathlib import Path
from typing import Any

from ckptbridge.converters.errors import StorageError
from ckptbridge.converters.hub.repository import Cancelled, Cut, HubFile, HubRepository

PART_SUFFIX = ".part"
_BLOCK_NBYTES = 1 << 20


def fetch(repository: HubRepository, name: str, folder: Path, stop: threading.Event) -> Path:
    """The file in `folder`, downloaded unless it is there already; what an earlier run left is used after a check.

    Raises StorageError when the connection stays cut, the disk is full, or the bytes are wrong twice; Cancelled when
    `stop` is set meanwhile.
    """
    file, path = repository.files[name], folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists() and _is_whole(path, file, stop):
            return path
        part = path.with_name(name + PART_SUFFIX)
        found = ""
        for _ in range(2):
            found = _received(repository, file, part, stop)
            if found == _expected(file):
                part.replace(path)
                return path
            part.unlink()
    except Cut as cut:
        raise StorageError(
            f"{repository.origin}/{name}: {cut}. What was written is kept: run again with --resume"
        ) from cut
    except OSError as error:
        raise StorageError(_disk_message(path, error)) from error
    raise StorageError(
        f"{repository.origin}/{name}: arrived damaged twice: expected checksum {_expected(file)}, found {found}. "
        "Something between here and the Hub changes bytes"
    )


def _received(repository: HubRepository, file: HubFile, part: Path, stop: threading.Event) -> str:
    """Fill `part` up to the file's size. Returns the checksum of its bytes."""
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if os.fstat(descriptor).st_size > file.size:
            os.ftruncate(descriptor, 0)
        digest, at = _hashed(descriptor, file, stop)
        for place, block in repository.blocks(file.name, at, file.size, stop):
            if place != at:  # the server begins anew: so does the file
                digest, at = _checksum(file), place
            _write(descriptor, block, at)
            digest.update(block)
            at += len(block)
        os.ftruncate(descriptor, at)
        return digest.hexdigest()
    finally:
        os.close(descriptor)


def _hashed(descriptor: int, file: HubFile, stop: threading.Event) -> tuple[Any, int]:
    """The checksum so far, and the number, of the bytes that an earlier run received."""
    digest, at = _checksum(file), 0
    while block := os.pread(descriptor, _BLOCK_NBYTES, at):
        if stop.is_set():
            raise Cancelled
        digest.update(block)
        at += len(block)
    return digest, at


def _is_whole(path: Path, file: HubFile, stop: threading.Event) -> bool:
    """Whether a finished shard is what the Hub has: a machine that lost power may have kept its name alone."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        digest, size = _hashed(descriptor, file, stop)
    finally:
        os.close(descriptor)
    return size == file.size and digest.hexdigest() == _expected(file)


def _checksum(file: HubFile) -> Any:
    """SHA-256 for what git LFS holds; for the rest git's own id of a blob."""
    if file.sha256 is not None:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)


def _expected(file: HubFile) -> str | None:
    return file.sha256 or file.blob


def _write(descriptor: int, block: bytes, at: int) -> None:
    view = memoryview(block)
    while len(view):
        count = os.pwrite(descriptor, view, at)
        view, at = view[count:], at + count


def _disk_message(path: Path, error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return (
            f"{path}: the disk is full while a shard is fetched. Free some space and run again with --resume, or name "
            "a target on another disk"
        )
    return f"{path}: cannot be written: {error.strerror}"
