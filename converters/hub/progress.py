"""Which pieces of unfinished output files are written already: the journal of a conversion that goes shard by shard.

A file is finished only when its last shard was there, which for a wide layout is at the very end; so what is durable
is told piece by piece, in files of the shards' folder. The first line of each names the plan.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ckptbridge.converters.disk import write_file

Pieces = dict[str, dict[str, tuple[str, int]]]
"""{file: {piece: (digest, CRC-32)}}"""
_STEM = "pieces.journal"


class PieceJournal:
    """One rank's journal of pieces; rank 0 prepares one for all before any rank begins."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._path = folder, folder / f"{_STEM}-{rank}"
        self._common = folder / _STEM

    def prepare(self, plan: str, files: Collection[str]) -> None:
        """Rank 0: put together what all ranks of an earlier run told of this plan, of these files alone.

        Of a file that is not there any more nothing is believed.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        found: Pieces = {}
        earlier = sorted(path for path in self._folder.iterdir() if path.name.startswith(_STEM))
        for path in earlier:
            begun, told = _read(path)
            for file, pieces in told.items():
                if begun == plan and file in files:
                    found.setdefault(file, {}).update(pieces)
        lines: list[dict[str, Any]] = [{"plan": plan}, {"pieces": found}]
        write_file(self._common, "".join(json.dumps(line) + "\n" for line in lines).encode())
        for path in earlier:
            if path != self._common:
                path.unlink()

    def begin(self) -> Pieces:
        """Begin this rank's own journal. Returns what was written before this run, as rank 0 put it together."""
        plan, found = _read(self._common)
        write_file(self._path, (json.dumps({"plan": plan}) + "\n").encode())
        return found

    def add(self, pieces: Mapping[str, Mapping[str, tuple[str, int]]]) -> None:
        """Pieces that are durable."""
        with self._path.open("a") as out:
            out.write(json.dumps({"pieces": pieces}) + "\n")
            out.flush()
            os.fsync(out.fileno())


def _read(path: Path) -> tuple[str, Pieces]:
    """(plan, pieces), as far as the lines are whole."""
    plan, found = "", Pieces()
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    for number, line in enumerate(lines):
        try:
            entry = json.loads(line)
            plan = plan if number else str(entry["plan"])
            for file, pieces in entry.get("pieces", {}).items():
                known = found.setdefault(str(file), {})
                known.update({str(name): (str(digest), int(crc)) for name, (digest, crc) in pieces.items()})
        except (ValueError, TypeError, KeyError, AttributeError):
            break
    return plan, found
