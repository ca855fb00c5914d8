"""Moving bytes: source files to output files in blocks, with a CRC-32 and a digest on the way.

A byte is read once for all the pieces that it goes to, into a block that stays in the cache while it is hashed and
written. Workers are threads: reading, writing and both hashes release the interpreter, and offsets are known
beforehand, so workers share files and need no communication.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ckptbridge.converters.blocks import bytes_of
from ckptbridge.converters.direct import DirectWriter
from ckptbridge.converters.disk import disk_message
from ckptbridge.converters.drafts import Draft, Stream, in_source_order
from ckptbridge.converters.finishing import Finisher
from ckptbridge.converters.narrowed import casts_watched
from ckptbridge.converters.output import OutputFile
from ckptbridge.converters.reading import read_exactly, watched
from ckptbridge.converters.tasks import Task, tasks_of
from ckptbridge.converters.tensors import Extent, LazyTensor, RowMap
from ckptbridge.converters.witness import Witness

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all); from one thread at a time."""

BLOCK_NBYTES = 1 << 20
"""One block fits the second-level cache: hashing then reads it from there and not from memory."""
ROWS_NBYTES = 4 << 20
"""What is computed of a tensor at a time, with all intermediate values: beyond it, the memory is what takes time."""


def work_nbytes(max_ram: int, workers: int) -> int:
    """What one worker works on at a time, in bytes.

    A block is alive until the next one is there, and the allocator keeps what threads give back: four times this is
    what a worker was seen to take.
    """
    return max(1 << 16, min(ROWS_NBYTES, max_ram // (4 * workers)))


class _AnotherFailedError(Exception):
    """Ends a worker whose work is of no use any more."""


class Copier:
    """Writes output files into a folder. `max_ram` bounds the blocks of all workers together, in bytes."""

    def __init__(
        self,
        folder: Path,
        *,
        workers: int,
        max_ram: int,
        progress: Progress | None,
        total: int,
        witness: Witness | None = None,
        direct: DirectWriter | None = None,
    ) -> None:
        self.folder, self.workers = folder, max(1, workers)
        self.work_nbytes = work_nbytes(max_ram, self.workers)
        self.block_nbytes = min(BLOCK_NBYTES, self.work_nbytes)
        self.witness = witness or Witness({})
        self._direct = direct
        self._progress, self._total, self._done = progress, total, 0
        self._failed = False
        self._lock = threading.Lock()
        self._local = threading.local()

    def advance(self, nbytes: int) -> None:
        """Tell the progress bar that so many bytes are done."""
        if self._failed:
            raise _AnotherFailedError
        with self._lock:
            self._done += nbytes
            if self._progress:
                self._progress(self._done, self._total)

    def write(self, file: OutputFile) -> dict[str, str]:
        """Write one file whole and sync it. Returns {piece name: XXH3-64 hex digest of its bytes}.

        Raises StorageError naming the file when the disk is full or fails.
        """
        digests: dict[str, str] = {}
        with Finisher(disk_message) as finisher:
            self.write_together([file], finisher, lambda _, written: digests.update(written))
        return digests

    def write_together(
        self, files: Sequence[OutputFile], finisher: Finisher, done: Callable[[OutputFile, dict[str, str]], None]
    ) -> None:
        """Write files whole; `done` is called with each and its pieces' digests, by the finisher, once it is durable.

        Raises StorageError naming the file when the disk is full or fails.
        """
        drafts: list[Draft] = []
        try:
            for file in files:
                drafts.append(Draft(self.folder / file.name, file, finisher, is_direct=self._direct is not None))
            self.run([partial(self.carry_out, task, drafts) for task in tasks_of(files)])
            for draft in drafts:
                draft.close()
        except BaseException:
            for draft in drafts:
                draft.abandon()
            raise
        for draft in drafts:
            finisher.finish(draft.descriptor, draft.path, partial(done, draft.file, draft.digests))

    def run(self, jobs: Sequence[Callable[[], None]]) -> None:
        """Do these jobs with all workers. Raises what the first one raises that fails; the others end soon then."""
        with _one_thread_each():
            if self.workers == 1 or len(jobs) < 2:
                for job in jobs:
                    job()
                return
            with ThreadPoolExecutor(self.workers) as pool:
                running = [pool.submit(job) for job in jobs]
                try:
                    for job in as_completed(running):
                        job.result()
                except BaseException:
                    self._failed = True
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise

    def carry_out(self, task: Task, drafts: Sequence[Draft]) -> None:
        """Write all pieces of a task: those that only move in the source's order, then those that are computed."""
        moved: list[tuple[Stream, Sequence[Extent]]] = []
        by_root: dict[int, list[Stream]] = {}
        with watched(self.witness.see), casts_watched(self.witness.see_cast):
            for outlet in task:
                stream = Stream(outlet, drafts, self.advance, self._direct)
                extents = outlet.tensor.extents()
                if extents is not None:
                    stream.seen = self.witness.claim(extents)
                    moved.append((stream, extents))
                else:
                    by_root.setdefault(id(_root(outlet.tensor)), []).append(stream)
            for stream, extent in in_source_order(moved):
                for block in self._blocks(extent):
                    stream.put(block)
            for streams in by_root.values():
                self._map_rows(streams)
            for stream, _ in moved:
                stream.end()

    def _map_rows(self, streams: Sequence[Stream]) -> None:
        """Write tensors that are functions of one tensor's rows, in one pass over it."""
        root = _root(streams[0].tensor)
        count = (root.shape[0] if root.shape else 1) if root.nbytes else 0
        row_nbytes = root.work_row_nbytes + sum(_extra_nbytes(stream.tensor) for stream in streams)
        step = max(1, self.work_nbytes // max(1, row_nbytes))
        for start in range(0, count, step):
            known = {id(root): root.read_rows(start, min(count, start + step))}
            for stream in streams:
                stream.put(bytes_of(_mapped(stream.tensor, known)))
        for stream in streams:
            stream.end()

    def _blocks(self, extent: Extent) -> Iterator[memoryview]:
        """The bytes of an extent in order. A block is valid until the next one is asked for."""
        if not hasattr(self._local, "buffer"):
            self._local.buffer = memoryview(bytearray(self.block_nbytes))
        buffer = self._local.buffer
        for start in range(0, extent.nbytes, len(buffer)):
            block = buffer[: min(len(buffer), extent.nbytes - start)]
            if extent.path is None:
                block[:] = bytes(len(block))
            else:
                read_exactly(extent.path, extent.offset + start, block)
            yield block


@contextmanager
def _one_thread_each() -> Generator[None]:
    """Workers are the parallelism: torch's own threads would make a cast of 4 MiB wait longer than it takes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _root(tensor: LazyTensor) -> LazyTensor:
    while isinstance(tensor, RowMap):
        tensor = tensor.base
    return tensor


def _extra_nbytes(tensor: LazyTensor) -> int:
    return tensor.extra_nbytes + _extra_nbytes(tensor.base) if isinstance(tensor, RowMap) else 0


def _mapped(tensor: LazyTensor, known: dict[int, Tensor]) -> Tensor:
    """Rows of a tensor out of the same rows of its root; what several tensors have in common is computed once."""
    if isinstance(tensor, RowMap) and id(tensor) not in known:
        known[id(tensor)] = tensor.function(_mapped(tensor.base, known))
    return known[id(tensor)]


def sum_nbytes(files: Sequence[OutputFile]) -> int:
    """Tensor bytes of all files."""
    return sum(file.tensor_nbytes for file in files)
