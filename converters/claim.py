"""One conversion at a time into a target: two would write the same files, and both would report success."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ckptbridge.converters.disk import PARTIAL_SUFFIX
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.file_lock import HeldElsewhere, locked, remove_unheld
from ckptbridge.converters.ranks import Rank


@contextmanager
def claimed(target: Path, me: Rank) -> Generator[None]:
    """Within it no other process writes this rank's share of `target`; with rank 0, nor that of a rank beyond.

    A rank that outlived an earlier run (on another host, say) keeps its claim until it ends. Locks end with their
    process; where the file system knows none, nothing is claimed. Raises BadInputError while another writes.
    """
    with ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(_lock_file(target, me.rank)))
            if me.rank == 0:
                for path in _lock_files(target):
                    if int(path.name.rpartition("-")[2]) >= me.world_size:
                        remove_unheld(path)
        except HeldElsewhere as holder:
            raise BadInputError(
                f"{target}: {holder} writes it at this moment; wait until it is done, or end it, and run again"
            ) from None
        yield


def _lock_file(target: Path, rank: int) -> Path:
    """Beside the partial folder, as journals are."""
    return target.with_name(f"{target.name}{PARTIAL_SUFFIX}.lock" + (f"-{rank}" if rank else ""))


def _lock_files(target: Path) -> list[Path]:
    """Those of all ranks but the first."""
    stem = _lock_file(target, 0).name + "-"
    return [p for p in target.parent.iterdir() if p.name.startswith(stem) and p.name.removeprefix(stem).isdigit()]
