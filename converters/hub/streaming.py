"""Converting a model from the Hub while it is fetched: the disk holds the output and a few shards, never the source.

Shard by shard, everything that is made of one is written, made durable and told to the journals; then the shard is
dropped. A run that was killed goes on with the first piece that no journal tells of.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ckptbridge.converters.copying import Copier
from ckptbridge.converters.disk import disk_message, reserve, write_exactly
from ckptbridge.converters.drafts import Draft
from ckptbridge.converters.errors import StorageError
from ckptbridge.converters.hub.progress import Pieces
from ckptbridge.converters.hub.schedule import Step, held_at_most, steps_of
from ckptbridge.converters.hub.shards import AHEAD, HubShards
from ckptbridge.converters.journal import Journal
from ckptbridge.converters.output import OutputFile
from ckptbridge.converters.tensors import Stored


class LastingDraft(Draft):
    """An output file that is filled over many shards, and perhaps by several runs.

    It has no descriptor and is opened for every block: a wide layout has more files than a process may have open.
    """

    def __init__(self, folder: Path, file: OutputFile, known: Mapping[str, tuple[str, int]]) -> None:
        self.path, self.file = folder / file.name, file
        self.digests = {name: digest for name, (digest, _) in known.items()}
        self.crcs = {name: crc for name, (_, crc) in known.items()}
        if not (self.path.is_file() and self.path.stat().st_size == file.size):
            self._create()

    @property
    def is_filled(self) -> bool:
        """Whether every piece was put."""
        return len(self.crcs) == len(self.file.pieces)

    def _create(self) -> None:
        """Take the space for the whole file."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            try:
                if self.file.size:
                    reserve(descriptor, self.file.size)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StorageError(disk_message(self.path, error)) from error

    def put(self, offset: int, data: memoryview | bytes) -> None:
        self._opened(partial(write_exactly, offset=offset, data=data))

    def begin_to_write(self, offset: int, nbytes: int) -> None:
        """The end of the shard is soon enough."""

    def settle(self) -> None:
        """Make durable what was put since the last time, with what depends on the CRCs once all of them are known."""
        if self.is_filled:
            self.close()
        self._opened(os.fsync)

    def _opened(self, use: Callable[[int], None]) -> None:
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
            try:
                use(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StorageError(disk_message(self.path, error)) from error


@dataclass(slots=True, kw_only=True)
class Streaming:
    """One run's way through the shards.

    The copier's witness knows the source tensors whose digests are not known yet. `done` is told of each file that is
    durable.
    """

    shards: HubShards
    copier: Copier
    journal: Journal
    done: Callable[[OutputFile, dict[str, str]], None]

    def write(self, files: Sequence[OutputFile]) -> None:
        """Write these files, and tell the journal the digests of the source tensors.

        Raises StorageError when the disk or the network fails; what the journals tell needs not be done again.
        """
        known = self.shards.progress.begin()
        steps = steps_of(files, known)
        drafts = [LastingDraft(self.copier.folder, file, known.get(file.name, {})) for file in files]
        self._check_space(steps, drafts)
        self.copier.advance(sum(p.tensor.nbytes for d in drafts for p in d.file.pieces if p.name in d.crcs))
        self._finish([draft for draft in drafts if draft.is_filled])
        names = self._names_by_shard()
        try:
            for number, step in enumerate(steps):
                self.shards.expect(sorted(step.needs))
                self.shards.expect(later.shard for later in steps[number + 1 : number + 1 + AHEAD])
                self.shards.wait(sorted(step.needs))
                self.copier.run([partial(self.copier.carry_out, task, drafts) for task in step.tasks])
                self._tell_sources([name for shard in step.drops for name in names.get(shard, ())])
                written = {file for file, _ in step.pieces()}
                self._finish([draft for draft in drafts if draft.file.name in written], step)
                for name in step.drops:
                    self.shards.drop(name)
        finally:
            self.shards.stop()

    def _tell_sources(self, names: Sequence[str]) -> None:
        """The digests of all tensors of the shards that will be dropped: durable before any piece made of them is told.

        So what was made of a shard is never done with while one of its digests is missing.
        """
        witness = self.copier.witness
        self.journal.add_sources(witness.finish(names, self.copier.workers), witness.bad())
        with self.journal.path.open("rb") as file:
            os.fsync(file.fileno())

    def _finish(self, drafts: Sequence[LastingDraft], step: Step | None = None) -> None:
        """Make the drafts durable, and tell the pieces of this step, and the files that are filled."""
        for draft in drafts:
            draft.settle()
        pieces: Pieces = {}
        by_file = {draft.file.name: draft for draft in drafts}
        for file, name in step.pieces() if step else ():
            pieces.setdefault(file, {})[name] = by_file[file].digests[name], by_file[file].crcs[name]
        if pieces:
            self.shards.progress.add(pieces)
        for draft in drafts:
            if draft.is_filled:
                self.done(draft.file, draft.digests)

    def _names_by_shard(self) -> dict[str, list[str]]:
        names: dict[str, list[str]] = {}
        for name, tensor in self.copier.witness.sources.items():
            if isinstance(tensor, Stored):
                names.setdefault(tensor.path.name, []).append(name)
        return names

    def _check_space(self, steps: Sequence[Step], drafts: Sequence[LastingDraft]) -> None:
        """Raises StorageError when the disk cannot hold the shards beside the output, before any is fetched."""
        unreserved = sum(max(0, draft.file.size - draft.path.stat().st_blocks * 512) for draft in drafts)
        sizes = {name: self.shards.nbytes(name) for step in steps for name in step.needs}
        count, most = held_at_most(steps, sizes, AHEAD)
        need = unreserved + most - self.shards.keep_only(sizes)
        free = shutil.disk_usage(self.copier.folder).free
        if need > free:
            raise StorageError(
                f"{self.copier.folder}: the disk has {free / 1e9:.2f} GB free; up to {count} shards of the model lie "
                f"there at a time ({most / 1e9:.2f} GB), beside the output. Free some space and run again with "
                "--resume, or name a folder on another disk"
            )
