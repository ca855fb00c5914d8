"""The demo's text: the Python standard library's own source, some files of which are never trained on."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from torch import Tensor

from ckptbridge.converters.errors import NotSupportedError
from ckptbridge.trainer.data import held_out_batches
from ckptbridge.trainer.documents import Documents, document_key
from ckptbridge.trainer.recipe import DataSection
from ckptbridge.trainer.tokens import load_tokenizer, tokenize

_LEFT_OUT = frozenset(("site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"))
"""Other people's packages, tests, and tables that only look like code."""
_SMALLEST, _LARGEST = 4_000, 100_000
"""Bytes of a file: below it is mostly a licence, above mostly data."""
_BYTES = 1_000_000
"""Of text: some 270,000 of SmolLM2's tokens, more than ten times what the demo trains on."""


def library_files(root: Path | None = None) -> list[Path]:
    """Source files of the standard library that are worth reading, sorted."""
    root = root or Path(os.__file__).parent
    return sorted(
        path
        for path in root.rglob("*.py")
        if not _LEFT_OUT & set(path.relative_to(root).parts)
        and _SMALLEST <= path.stat().st_size <= _LARGEST
        and _is_text(path)
    )


def _is_text(path: Path) -> bool:
    try:
        return "\0" not in path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return False


def data_section(sequence_length: int, micro_batch_size: int, global_batch_size: int) -> DataSection:
    """The text of a run: about 1 MB of code, a tenth of its files held out.

    Raises NotSupportedError where Python comes without its library's source.
    """
    files = library_files()
    if not files:
        raise NotSupportedError(
            f"{Path(os.__file__).parent}: holds no source of the standard library, which the demo trains on"
        )
    return DataSection(
        text=[str(path) for path in files],
        sequence_length=sequence_length,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        held_out_fraction=0.1,
        max_bytes=_BYTES,
    )


def held_out_files(data: DataSection) -> list[Path]:
    """The files that a run on this data never trains on."""
    documents = Documents(data)
    keys = documents.held_out()
    texts = ((file.path, file.path.read_bytes().decode("utf-8")) for file in documents.files)
    return sorted(path for path, text in texts if document_key(text, data.seed) in keys)


def held_out_tokens(data: DataSection, batches: int, tokenizer_folder: Path, vocab_size: int) -> list[Tensor]:
    """The batches [B, S + 1] on which a run measures its held-out loss, made anew with the tokenizer of a folder."""
    with tempfile.TemporaryDirectory(prefix="ckptbridge-demo-") as folder:
        tokens = tokenize(Documents(data), load_tokenizer(tokenizer_folder), vocab_size, Path(folder))
        return held_out_batches(tokens, data, batches)
