"""Shards of a model on the Hub: fetched before they are needed, dropped when they are not needed any more.

They lie beside the unfinished target, in `TARGET.partial.shards`, and only until the conversion is done with them. A
run that was killed finds there what it had fetched. Of several ranks each has a folder of its own in it.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ckptbridge.converters.hub.download import PART_SUFFIX, fetch
from ckptbridge.converters.hub.progress import PieceJournal
from ckptbridge.converters.hub.repository import HubRepository

SHARDS_SUFFIX = ".partial.shards"
AHEAD = 2
"""How many shards are fetched while one is converted: one connection rarely fills the line, three mostly do."""


class HubShards:
    """The shard files of a model, which come and go. `progress` tells what was made of them."""

    def __init__(self, repository: HubRepository, target: Path, rank: int = 0) -> None:
        self.repository, self.rank = repository, rank
        self.root = target.with_name(target.name + SHARDS_SUFFIX)
        self.folder = self.root / f"{repository.commit}-{rank}"
        self.progress = PieceJournal(self.root, rank)
        self._stop = threading.Event()
        self._pool: ThreadPoolExecutor | None = None
        self._coming: dict[str, Future[Path]] = {}

    def nbytes(self, name: str) -> int:
        """The size of a shard."""
        return self.repository.files[name].size

    def keep_only(self, names: Iterable[str]) -> int:
        """Drop what an earlier run left of all other shards. Returns the bytes of what is kept."""
        kept = {name + ending for name in names for ending in ("", PART_SUFFIX)}
        nbytes = 0
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.name in kept:
                nbytes += path.stat().st_size
            else:
                path.unlink()
        return nbytes

    def expect(self, names: Iterable[str]) -> None:
        """Begin to fetch these, in this order, unless it was begun."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(AHEAD + 1, thread_name_prefix="shard")
        for name in names:
            if name not in self._coming:
                self._coming[name] = self._pool.submit(fetch, self.repository, name, self.folder, self._stop)

    def wait(self, names: Sequence[str]) -> None:
        """Until these are there. Raises StorageError or BadInputError when one cannot be had."""
        self.expect(names)
        for name in names:
            self._coming[name].result()

    def drop(self, name: str) -> None:
        """Remove a shard."""
        self._coming.pop(name, None)
        (self.folder / name).unlink(missing_ok=True)

    def stop(self) -> None:
        """End all fetching; what has arrived is kept."""
        self._stop.set()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def remove(self) -> None:
        """Drop everything, of all ranks."""
        self.stop()
        shutil.rmtree(self.root, ignore_errors=True)
