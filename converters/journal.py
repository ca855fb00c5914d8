"""What an unfinished conversion has done: one line a finished file, beside the partial folder.

The first line names the plan. A line stands only for a file that is durable, so that whatever the journal tells can be
kept after a crash; a line that was torn by one ends the journal.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ckptbridge.converters.disk import PARTIAL_SUFFIX, write_file
from ckptbridge.converters.finite import NotFinite

FINISHED = "finished"
"""In place of the plan once only names are left to change: the folder is not to be resumed then."""


@dataclass(slots=True)
class Record:
    """`files`: each finished file's digests by piece; `sources`: digests by source tensor; `bad`: as the witness's."""

    files: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    sources: dict[str, str] = field(default_factory=dict[str, str])
    bad: dict[str, NotFinite] = field(default_factory=dict[str, NotFinite])

    def add(self, other: Record) -> None:
        self.files |= other.files
        self.sources |= other.sources
        for name, found in other.bad.items():
            self.bad[name] = found.merged(self.bad[name]) if name in self.bad else found


def journal_file(target: Path, rank: int = 0) -> Path:
    """Beside the partial folder, so that the folder holds nothing but the output, and is known as ours to the end."""
    return target.with_name(f"{target.name}{PARTIAL_SUFFIX}.journal" + (f"-{rank}" if rank else ""))


def journal_files(target: Path) -> list[Path]:
    """The journals of all ranks, those of an earlier run with other ranks included."""
    first = journal_file(target)
    others = sorted(path for path in first.parent.iterdir() if path.name.startswith(first.name + "-"))
    return [path for path in (first, *others) if path.exists()]


class Journal:
    """The journal of one rank, for writing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._told: set[str] = set()
        self._overflowed: dict[str, int] = {}

    def begin(self, plan: str, record: Record | None = None) -> None:
        """Write it anew: the plan, and what is done already."""
        record = record or Record()
        lines = [{"plan": plan}, *({"file": name, "digests": digests} for name, digests in record.files.items())]
        if record.sources:
            lines.append(self._of_sources(record.sources, record.bad))
        write_file(self.path, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def add_file(
        self, name: str, digests: Mapping[str, str], sources: Mapping[str, str], bad: Mapping[str, NotFinite]
    ) -> None:
        """A file that is durable, and the source tensors that were read whole meanwhile."""
        self._append({"file": name, "digests": digests, **self._of_sources(sources, bad)})

    def add_sources(self, sources: Mapping[str, str], bad: Mapping[str, NotFinite]) -> None:
        """Source tensors that were read whole."""
        self._append(self._of_sources(sources, bad))

    def _append(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a") as out:
            out.write(json.dumps(line) + "\n")

    def _of_sources(self, sources: Mapping[str, str], bad: Mapping[str, NotFinite]) -> dict[str, Any]:
        """Those that were not told before; an overflow is found as the result is made, after the digest or before."""
        new = {name: digest for name, digest in sources.items() if name not in self._told}
        self._told |= new.keys()
        more = {n: found.overflowed for n, found in bad.items() if found.overflowed > self._overflowed.get(n, 0)}
        self._overflowed |= more
        told = {name: asdict(found) for name, found in bad.items() if name in new or name in more}
        return {"sources": new, "bad": told}


def read_journal(path: Path) -> tuple[str | None, Record]:
    """(plan, record) of a journal, as far as its lines are whole."""
    lines = path.read_text(errors="replace").split("\n")
    record = Record()
    plan: str | None = None
    for number, line in enumerate(lines):
        try:
            entry = json.loads(line)
            if number == 0:
                plan = str(entry["plan"])
                continue
            told = Record()
            if "file" in entry:
                told.files[str(entry["file"])] = {str(k): str(v) for k, v in entry["digests"].items()}
            told.sources = {str(name): str(digest) for name, digest in entry.get("sources", {}).items()}
            told.bad = {str(name): NotFinite(**found) for name, found in entry.get("bad", {}).items()}
            record.add(told)
        except (ValueError, TypeError, KeyError, AttributeError):
            break
    return plan, record
