"""Documents as two flat files of token ids in the run folder: one to train on, one held out.

They are written once and mapped into memory; a resumed run finds them again as long as the text, the tokenizer
and what the recipe says of them are the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from ckptbridge.converters.disk import write_file
from ckptbridge.converters.errors import BadInputError
from ckptbridge.trainer.documents import Documents, document_key

_BATCH_CHARACTERS = 1 << 20
"""Documents are tokenised so much text at a time: enough for the tokenizer's threads, little memory."""
_COUNTS = ("train", "held_out", "files", "passed_over")
_DTYPES = ("<u2", "<u4")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """All token ids of a run, mapped read-only, and a digest by which a resumed run knows them."""

    train: NDArray[np.integer[Any]]
    held_out: NDArray[np.integer[Any]]
    digest: str
    note: str | None = None
    """A sentence about files that gave no text though a folder or a glob found them."""


def tokenize(documents: Documents, tokenizer: Any, vocab_size: int, folder: Path) -> Tokens:
    """The tokens of the documents, from `folder` if they lie there already, else computed and written there.

    `tokenizer` is a transformers tokenizer. Raises BadInputError when it makes ids that the model does not have, or
    none of any document, or knows no end-of-sequence token though the recipe asks for one after each document.
    """
    key = _key(documents, tokenizer, vocab_size)
    index = folder / "index.json"
    if (found := _index(index)) is not None and found["key"] == key:
        return _opened(folder, found)
    folder.mkdir(parents=True, exist_ok=True)
    index.unlink(missing_ok=True)
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    found = {"key": key, "dtype": dtype.str, **_write(documents, tokenizer, vocab_size, dtype, folder)}
    write_file(index, json.dumps(found, indent=1).encode())
    return _opened(folder, found)


def _index(path: Path) -> dict[str, Any] | None:
    """What a folder of tokens says of itself; None where that is missing or damaged: the text gives them again.

    What they come to is compared with the checkpoint of a run that goes on, by the digest.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.get("dtype") not in _DTYPES:
        return None
    are_counts = all(type(found.get(name)) is int and found[name] >= 0 for name in _COUNTS)
    are_words = all(isinstance(found.get(name), str) for name in ("key", "digest"))
    return found if are_counts and are_words else None


def _opened(folder: Path, index: dict[str, Any]) -> Tokens:
    arrays = {}
    for name in ("train", "held_out"):
        path, dtype = folder / f"{name}.bin", np.dtype(index["dtype"])
        expected, found = index[name] * dtype.itemsize, path.stat().st_size if path.is_file() else None
        if found != expected:
            is_what = "is missing" if found is None else f"has {found} bytes"
            raise BadInputError(
                f"{path}: {is_what}, but {folder / 'index.json'} tells of {expected}; delete {folder}, and the next "
                "run makes the tokens anew"
            )
        # A file without bytes cannot be mapped.
        arrays[name] = np.memmap(path, dtype, "r") if index[name] else np.empty(0, dtype)
    note, passed_over = None, index["passed_over"]
    if passed_over:
        note = f"data.text: {passed_over} of {index['files']} files found were passed over: they are no UTF-8 text."
    return Tokens(train=arrays["train"], held_out=arrays["held_out"], digest=index["digest"], note=note)


def _write(
    documents: Documents, tokenizer: Any, vocab_size: int, dtype: np.dtype[Any], folder: Path
) -> dict[str, int | str]:
    """Write both files. Returns how many tokens each holds, the digest of both, and how many files gave no text."""
    options = documents.options
    end = [tokenizer.eos_token_id] if options.end_of_text else []
    if end == [None]:
        raise BadInputError("the tokenizer has no end-of-sequence token: set data.end_of_text to false")
    held_out, counts, of_text = documents.held_out(), {"train": 0, "held_out": 0}, 0
    digests = {name: xxhash.xxh3_64() for name in counts}
    files: dict[str, BinaryIO] = {}
    try:
        for name in counts:
            files[name] = (folder / f"{name}.bin").open("wb")
        for batch in _batches(documents):
            ids = _ids(tokenizer, batch)
            for document, tokens in zip(batch, ids, strict=True):
                of_text += len(tokens)
                row = np.array(tokens + end, np.int64)
                if row.size and row.max() >= vocab_size:
                    raise BadInputError(
                        f"the tokenizer makes token {row.max()}, but the model has {vocab_size} words: "
                        "it belongs to another model (data.tokenizer names one)"
                    )
                name = "held_out" if document_key(document, options.seed) in held_out else "train"
                data = row.astype(dtype).tobytes()
                files[name].write(data)
                digests[name].update(data)
                counts[name] += row.size
    finally:
        for file in files.values():
            file.close()
    if not of_text:
        raise BadInputError(
            f"{tokenizer.name_or_path}: the tokenizer makes no token of any document: its vocabulary is empty, or of "
            "another script; data.tokenizer names another folder"
        )
    return {
        **counts,
        "digest": "".join(digest.hexdigest() for digest in digests.values()),
        "files": len(documents.files),
        "passed_over": len(documents.passed_over),
    }


def _ids(tokenizer: Any, batch: list[str]) -> list[list[int]]:
    try:
        return tokenizer(batch, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    except Exception as error:  # the tokenizers library raises no class of its own
        raise BadInputError(
            f"{tokenizer.name_or_path}: the tokenizer fails: {error}; data.tokenizer names another folder"
        ) from error


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _key(documents: Documents, tokenizer: Any, vocab_size: int) -> str:
    """A digest of everything that decides the tokens, files by name, size and time of change."""
    options = documents.options
    decisive = {
        "recipe": options.model_dump(
            include={"document_separator", "end_of_text", "held_out_fraction", "max_documents", "max_bytes", "seed"}
        ),
        "text": _stamps([file.path for file in documents.files]),
        "tokenizer": _stamps(sorted(p for p in Path(tokenizer.name_or_path).glob("*token*") if p.is_file())),
        "vocab_size": vocab_size,
    }
    return xxhash.xxh3_128(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _stamps(paths: Sequence[Path]) -> list[tuple[str, int, int]]:
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def load_tokenizer(folder: Path) -> Any:
    """The transformers tokenizer of a folder, offline. Raises BadInputError if it holds none, or one without words."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise BadInputError(
            f"{folder}: no tokenizer can be loaded from it; data.tokenizer may name another folder. {error}"
        ) from error
    # Of a folder without tokenizer files transformers makes one that knows special tokens alone: text becomes nothing.
    if not set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab()) - set(tokenizer.all_special_tokens):
        files = dict(tokenizer.vocab_files_names)
        absent = ", ".join(name for name in files.values() if not (folder / name).is_file())
        raise BadInputError(
            f"{folder}: its tokenizer ({type(tokenizer).__name__}) has no vocabulary but special tokens; not there: "
            f"{absent or 'nothing'}. Add tokenizer.json, or the other files that the model came with, or let "
            "data.tokenizer name a folder that has them"
        )
    # The text is cut into sequences afterwards, so a warning that a document is long would only alarm.
    tokenizer.model_max_length = 1 << 60
    return tokenizer
