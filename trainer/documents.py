"""The documents of a run: which files, cut where, taken in which order, held out or not. Text only, no tokens."""

from __future__ import annotations

import glob
import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ckptbridge.converters.errors import BadInputError, StorageError

if TYPE_CHECKING:
    from ckptbridge.trainer.recipe import DataSection


@dataclass(frozen=True, slots=True)
class TextFile:
    """A file to read. `named` says that the recipe names this very file, so that it may not be passed over."""

    path: Path
    named: bool


def find_files(patterns: list[str], run_folder: Path | None = None) -> list[TextFile]:
    """The files of a recipe's `data.text`, each once, sorted by path. Raises BadInputError if a pattern finds none.

    What lies below `run_folder`, where the run itself writes, is left out unless it is named file by file.
    """
    home = None if run_folder is None else run_folder.expanduser().resolve()
    found: dict[Path, TextFile] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_file():
            matches = [TextFile(path, named=True)]
        elif path.is_dir():
            matches = [TextFile(p, named=False) for p in path.rglob("*") if p.is_file()]
        else:
            names = glob.glob(str(path), recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
            matches = [TextFile(Path(name), named=False) for name in names if Path(name).is_file()]
        if not matches:
            raise BadInputError(f"data.text: {pattern!r} is no file and no folder, and matches no file as a glob")
        kept = [match for match in matches if match.named or home is None or not _lies_in(match.path, home)]
        if not kept:
            raise BadInputError(
                f"data.text: all {len(matches)} files of {pattern!r} lie below run_folder {run_folder}, where the run "
                "writes its own files, so they are left out; name another run_folder, or each file by itself"
            )
        for match in kept:
            found.setdefault(match.path, match)
    return [found[path] for path in sorted(found)]


def _lies_in(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder)


class Documents:
    """The documents that a recipe takes, in the order that its seed draws; re-read each time they are walked.

    Files that are no UTF-8 text are passed over when a folder or a glob found them, and refused when named. So are
    files below `run_folder`, as `find_files` says.
    """

    def __init__(self, options: DataSection, run_folder: Path | None = None) -> None:
        self.options = options
        self.files = find_files(options.text, run_folder)
        self.passed_over: set[Path] = set()
        """Files that are no text, of those that were read so far."""
        random.Random(options.seed).shuffle(self.files)

    def __iter__(self) -> Iterator[str]:
        options, count, size = self.options, 0, 0
        for file in self.files:
            for document in self._split(file):
                if count == options.max_documents or (options.max_bytes and size >= options.max_bytes):
                    return
                count, size = count + 1, size + len(document.encode())
                yield document

    def _split(self, file: TextFile) -> Iterator[str]:
        try:
            text = file.path.read_bytes().decode("utf-8")
        except OSError as error:
            raise StorageError(f"{file.path}: cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            if file.named:
                raise BadInputError(f"{file.path}: no UTF-8 text: {error}") from error
            self.passed_over.add(file.path)
            return
        if "\0" in text:
            if file.named:
                raise BadInputError(f"{file.path}: holds zero bytes: a binary file, not text")
            self.passed_over.add(file.path)
            return
        separator = self.options.document_separator
        for document in (text,) if separator is None else text.split(separator):
            if document.strip():
                yield document

    def held_out(self) -> frozenset[bytes]:
        """The keys (see `document_key`) of held-out documents: equal texts are all on one side.

        The split depends on the texts and the seed alone, not on file names or order. Raises BadInputError if
        there are too few documents to hold one out and train on another.
        """
        keys = {document_key(document, self.options.seed) for document in self}
        if not keys:
            raise BadInputError("data.text: no text was found in the files; all are empty or binary")
        if not self.options.held_out_fraction:
            return frozenset()
        if len(keys) < 2:
            raise BadInputError(
                "data.held_out_fraction: holding documents out needs two different ones, but the text is a single "
                "document; set data.document_separator to cut it, or data.held_out_fraction to 0"
            )
        count = min(max(1, round(self.options.held_out_fraction * len(keys))), len(keys) - 1)
        return frozenset(sorted(keys)[:count])


def document_key(document: str, seed: int) -> bytes:
    """A digest by which documents are told apart and drawn: keyed by the seed, so another seed draws others."""
    return hashlib.blake2b(document.encode(), digest_size=16, key=seed.to_bytes(16, "little")).digest()
