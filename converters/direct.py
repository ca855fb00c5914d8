"""Writing past the page cache, for outputs that would fill it.

Beyond a share of the memory the kernel makes writers wait, and looks for room while they do: 8.2 GB on a machine of
24 GiB took 8 to 18 s of system time and 9 to 11 s in all. Direct writes took 1.5 s of system time and 6 s, which is
the disk's own rate: it fetches aligned blocks from buffers of ours. At 3.2 GB the page cache is the faster way, by a
tenth, and what was written is in memory when it is read next.

The first and the last bytes of a run, which share a block with its neighbours, go through the page cache.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from ckptbridge.converters.disk import disk_message
from ckptbridge.converters.errors import StorageError

ALIGNMENT = max(4096, mmap.PAGESIZE)
"""What the file offset, the length and the memory of a direct write are multiples of. No common disk asks for more than
4096; a page of 64 KiB, as some Arm kernels have it, must not be shared by direct and cached writes."""
BUFFER_NBYTES = 4 << 20
"""One direct write: at 1.5 GB/s it takes 3 ms, against some 0.1 ms for the call and the interrupt."""
SMALLEST_RUN_NBYTES = 1 << 20
"""Less than this is not worth a write of its own, and goes through the page cache."""
WRITES_AT_ONCE = 2
"""While one is written, the next one is on its way; more of them did not make a virtual disk faster."""
DIRECT_NBYTES = 64 << 20
"""All buffers together: eight pieces of the output can be filled at the same time."""
SHARE_OF_MEMORY = 5
"""An output of more than a fifth of the memory that is free or could be freed is written past the page cache."""


def available_nbytes() -> int | None:
    """Memory that is free, or that the kernel could free without swapping; None where it does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)


def is_worth_it(folder: Path, output_nbytes: int) -> bool:
    """Whether an output of this size would fill the page cache, on a disk of this machine.

    A server behind a network is better asked in its own protocol: there the cache gathers writes while they travel.
    """
    available = available_nbytes()
    return available is not None and output_nbytes > available // SHARE_OF_MEMORY and is_on_a_disk(folder)


def is_on_a_disk(folder: Path) -> bool:
    """Whether a block device is behind a folder: network, memory and layered file systems have the major number 0."""
    return os.major(folder.stat().st_dev) != 0


def open_direct(path: Path) -> int | None:
    """A second descriptor of a file, for direct writes; None where the system or the file system has none."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return None


class DirectWriter:
    """Threads that write filled buffers, so that whoever fills them need not wait for the disk. `nbytes` of buffers.

    Leaving it waits for the threads.
    """

    def __init__(self, nbytes: int, buffer_nbytes: int = BUFFER_NBYTES) -> None:
        # A run holds one buffer that is not full. With two buffers for each run, the one that is waited for is always
        # one that a thread is writing.
        self._runs = max(1, nbytes // buffer_nbytes // 2)
        self._buffer_nbytes = buffer_nbytes
        self._buffers: list[mmap.mmap] = []
        self._there_is_one = threading.Semaphore(2 * self._runs)
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(WRITES_AT_ONCE, "direct-writer")

    def __enter__(self) -> DirectWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, file: DirectFile, offset: int, nbytes: int) -> DirectRun | None:
        """What takes `nbytes` of a file from `offset` on; None when as many as there are buffers for are under way."""
        with self._lock:
            if not self._runs:
                return None
            self._runs -= 1
        return DirectRun(self, file, offset, nbytes)

    def end(self, run: DirectRun) -> None:
        """This run got all of its bytes."""
        if run.buffer is not None:
            self.give_back(run.buffer)
        with self._lock:
            self._runs += 1

    def take(self) -> mmap.mmap:
        """A buffer for the caller alone."""
        self._there_is_one.acquire()
        with self._lock:
            return self._buffers.pop() if self._buffers else mmap.mmap(-1, self._buffer_nbytes)

    def give_back(self, buffer: mmap.mmap) -> None:
        """The caller needs it no longer."""
        with self._lock:
            self._buffers.append(buffer)
        self._there_is_one.release()

    def write(self, file: DirectFile, offset: int, buffer: mmap.mmap, nbytes: int) -> None:
        """Write the first bytes of a buffer in the background, and give it back."""
        file.under_way.append(self._pool.submit(self._write, file, offset, buffer, nbytes))

    def _write(self, file: DirectFile, offset: int, buffer: mmap.mmap, nbytes: int) -> None:
        try:
            with memoryview(buffer) as view:
                file.write(offset, view[:nbytes])
        finally:
            self.give_back(buffer)


class DirectFile:
    """A file that is written past the page cache. `put(offset, data)` writes through it, as the file's owner does.

    All methods raise StorageError when a write failed, their own or an earlier one.
    """

    def __init__(self, path: Path, descriptor: int, put: Callable[[int, memoryview], None]) -> None:
        self.path, self.put = path, put
        self.under_way: list[Future[None]] = []
        self._descriptor = descriptor
        self._failed: StorageError | None = None

    def check(self) -> None:
        """Raise what went wrong so far."""
        if self._failed is not None:
            raise self._failed

    def write(self, offset: int, data: memoryview) -> None:
        """Write aligned bytes.

        A file system that opens files for direct writes and then refuses one gets these bytes through the page cache.
        """
        self.check()
        try:
            while len(data):
                count = self._write_some(offset, data)
                if not count or count % ALIGNMENT:
                    self.put(offset, data)
                    return
                data, offset = data[count:], offset + count
        except OSError as error:
            self._failed = StorageError(disk_message(self.path, error))
            raise self._failed from error

    def _write_some(self, offset: int, data: memoryview) -> int:
        try:
            return os.pwrite(self._descriptor, data, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return 0

    def close(self) -> None:
        """Wait for all writes."""
        try:
            for write in self.under_way:
                write.result()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Write nothing more, and tell nothing."""
        for write in self.under_way:
            write.cancel()
        wait(self.under_way)
        self.under_way.clear()
        os.close(self._descriptor)


class DirectRun:
    """Bytes of a file in order, from `offset` on: whole blocks directly, the ends through the page cache."""

    def __init__(self, writer: DirectWriter, file: DirectFile, offset: int, nbytes: int) -> None:
        self.buffer: mmap.mmap | None = None
        self._writer, self._file = writer, file
        self._at = offset
        self._begin = -(-offset // ALIGNMENT) * ALIGNMENT
        self._end = (offset + nbytes) // ALIGNMENT * ALIGNMENT
        self._held = 0

    def put(self, data: memoryview) -> None:
        """The next bytes."""
        while len(data):
            if self._begin <= self._at < self._end:
                count = self._fill(data)
            else:
                count = min(len(data), self._begin - self._at) if self._at < self._begin else len(data)
                self._file.put(self._at, data[:count])
                self._at += count
            data = data[count:]

    def _fill(self, data: memoryview) -> int:
        """Take as many bytes as the buffer has room for, and hand it over when it is full."""
        if self.buffer is None:
            self._file.check()
            self.buffer, self._held = self._writer.take(), 0
        count = min(len(data), len(self.buffer) - self._held, self._end - self._at)
        self.buffer[self._held : self._held + count] = data[:count]
        self._held += count
        self._at += count
        if self._held == len(self.buffer) or self._at == self._end:
            buffer, self.buffer = self.buffer, None
            self._writer.write(self._file, self._at - self._held, buffer, self._held)
        return count
