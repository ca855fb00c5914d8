"""Moving bytes: source files to output files in blocks, with a CRC-32 and a digest on the way.

A byte that only moves is read once, into a block that stays in the cache while it is hashed and written; a matrix
whose columns are cut is read once for every cut. Workers are
threads: reading, writing and both hashes release the interpreter, and offsets are known beforehand, so
workers share files and need no communication.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import xxhash

from ckptbridge.converters.errors import StorageError
from ckptbridge.converters.output import OutputFile, Piece
from ckptbridge.converters.tensors import LazyTensor, read_exactly

try:
    from isal.isal_zlib import crc32  # pyright: ignore[reportUnknownVariableType] - 16 GB/s a core, against zlib's 2.4
except ImportError:
    from zlib import crc32

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all); from one thread at a time."""

BLOCK_NBYTES = 1 << 20
"""One block fits the second-level cache: hashing then reads it from there and not from memory."""


PARTIAL_SUFFIX = ".partial"
"""What a folder's name ends with until it is whole."""


def work_nbytes(max_ram: int, workers: int) -> int:
    """What one worker reads at a time, in bytes: at most 32 MiB, which hides every start-up cost.

    A block is alive until the next one is there, and the allocator keeps what threads give back: four times this is
    what a worker was seen to take.
    """
    return max(1 << 16, min(32 << 20, max_ram // (4 * workers)))


class Copier:
    """Writes output files into a folder. `max_ram` bounds the blocks of all workers together, in bytes."""

    def __init__(self, folder: Path, *, workers: int, max_ram: int, progress: Progress | None, total: int) -> None:
        self.folder, self.workers = folder, max(1, workers)
        self.work_nbytes = work_nbytes(max_ram, self.workers)
        self.block_nbytes = min(BLOCK_NBYTES, self.work_nbytes)
        self._progress, self._total, self._done = progress, total, 0
        self._lock = threading.Lock()
        self._local = threading.local()

    def advance(self, nbytes: int) -> None:
        """Tell the progress bar that so many bytes are done."""
        with self._lock:
            self._done += nbytes
            if self._progress:
                self._progress(self._done, self._total)

    def write(self, file: OutputFile) -> dict[str, str]:
        """Write one file whole and sync it. Returns {piece name: XXH3-64 hex digest of its bytes}.

        Raises StorageError naming the file when the disk is full or fails.
        """
        path = self.folder / file.name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                if file.size:
                    _reserve(descriptor, file.size)
                written = self._write_pieces(descriptor, file)
                crcs = {name: crc for name, (_, crc) in written.items()}
                for offset, data in (*file.patches, *(file.closing(crcs) if file.closing else ())):
                    _write_exactly(descriptor, offset, data)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StorageError(disk_message(path, error)) from error
        return {name: digest for name, (digest, _) in written.items()}

    def _write_pieces(self, descriptor: int, file: OutputFile) -> dict[str, tuple[str, int]]:
        """{piece name: (digest, CRC-32)}"""
        if self.workers == 1 or len(file.pieces) < 2:
            return {piece.name: self._write_piece(descriptor, piece) for piece in file.pieces}
        with ThreadPoolExecutor(self.workers) as pool:
            jobs = {piece.name: pool.submit(self._write_piece, descriptor, piece) for piece in file.pieces}
            try:
                for job in as_completed(jobs.values()):
                    job.result()  # the first failure ends the file
                return {name: job.result() for name, job in jobs.items()}
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _write_piece(self, descriptor: int, piece: Piece) -> tuple[str, int]:
        crc, digest, at = 0, xxhash.xxh3_64(), piece.offset
        for block in self._blocks(piece.tensor):
            crc = crc32(block, crc)
            digest.update(block)
            _write_exactly(descriptor, at, block)
            at += len(block)
            self.advance(len(block))
        for offset, data in piece.frame(crc) if piece.frame else ():
            _write_exactly(descriptor, offset, data)
        return digest.hexdigest(), crc

    def _blocks(self, tensor: LazyTensor) -> Iterator[memoryview]:
        """The bytes of a tensor in order. A block is valid until the next one is asked for."""
        extents = tensor.extents()
        if extents is None:
            yield from row_blocks(tensor, self.work_nbytes)
            return
        buffer = self._buffer()
        for extent in extents:
            for start in range(0, extent.nbytes, len(buffer)):
                block = buffer[: min(len(buffer), extent.nbytes - start)]
                if extent.path is None:
                    block[:] = bytes(len(block))
                else:
                    read_exactly(extent.path, extent.offset + start, block)
                yield block

    def _buffer(self) -> memoryview:
        if not hasattr(self._local, "buffer"):
            self._local.buffer = memoryview(bytearray(self.block_nbytes))
        return self._local.buffer


def row_blocks(tensor: LazyTensor, budget_nbytes: int) -> Iterator[memoryview]:
    """The bytes of a tensor that has to be computed, a few rows at a time."""
    if not tensor.nbytes:
        return
    count = tensor.shape[0] if tensor.shape else 1
    step = max(1, budget_nbytes // max(1, tensor.work_row_nbytes))
    for start in range(0, count, step):
        rows = tensor.read_rows(start, min(count, start + step))
        yield memoryview(rows.contiguous().reshape(-1).view(torch.uint8).numpy())  # pyright: ignore


def digest_of(tensor: LazyTensor, budget_nbytes: int = 1 << 20) -> str:
    """The XXH3-64 digest of a tensor's bytes, read in blocks."""
    digest = xxhash.xxh3_64()
    for block in row_blocks(tensor, budget_nbytes):
        digest.update(block)
    return digest.hexdigest()


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

    On Linux the two change places in one step; elsewhere the old one is set aside as `.replaced` first.
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
        old = target.with_name(target.name + ".replaced")
        shutil.rmtree(old, ignore_errors=True)
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


def _reserve(descriptor: int, size: int) -> None:
    """Take the space now: a full disk shows before the work, and the blocks lie together."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, size)


def _write_exactly(descriptor: int, offset: int, data: memoryview | bytes) -> None:
    view: Any = memoryview(data)
    while len(view):
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def disk_message(path: Path, error: OSError) -> str:
    partial = next((p for p in (path, *path.parents) if p.name.endswith(PARTIAL_SUFFIX)), path.parent)
    if error.errno == errno.ENOSPC:
        return (
            f"{path}: the disk is full. What was written lies in {partial}: free some space and run again with --resume"
        )
    return f"{path}: cannot be written: {error.strerror}. What was written lies in {partial}"


def sum_nbytes(files: Sequence[OutputFile]) -> int:
    """Tensor bytes of all files."""
    return sum(file.tensor_nbytes for file in files)
