"""A Hugging Face folder: its config, its tensors by header alone, and the files that travel beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptbridge.converters.errors import BadInputError, told
from ckptbridge.converters.pickles import TensorRef
from ckptbridge.converters.safetensors_header import read_header
from ckptbridge.converters.small_files import MOST_NBYTES, is_file_name, read_small
from ckptbridge.converters.tensors import Checkpoint, LazyTensor, Stored
from ckptbridge.converters.torch_archive import read_archive, stored_tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"

ASSET_NAMES = (
    *(
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "vocab.json",
        "merges.txt",
    ),
    *(
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "preprocessor_config.json",
    ),
    *("tekken.json", "spiece.model", "LICENSE", "LICENSE.txt", "NOTICE", "README.md"),
)
"""What a model needs beside its weights, and what its licence asks to keep: copied byte for byte."""


@dataclass(frozen=True, slots=True)
class HfFolder:
    path: Path
    config: dict[str, Any]
    tensors: Checkpoint
    assets: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    """What the user should know about how it was read."""


def open_hf_folder(folder: Path) -> HfFolder:
    """Open a folder as `save_pretrained` writes it. Reads config.json, the index and the headers, no tensor.

    Raises BadInputError naming the file (and tensor) for anything missing, truncated or contradictory.
    """
    return HfFolder(folder, read_json(folder / "config.json"), _tensors(folder), find_assets(folder))


def find_assets(folder: Path) -> tuple[Path, ...]:
    """The tokenizer and generation files of a folder."""
    found = tuple(folder / name for name in ASSET_NAMES if (folder / name).is_file())
    for path in found:  # they are read whole when they are copied
        if (size := path.stat().st_size) > MOST_NBYTES:
            raise BadInputError(f"{path}: has {size} bytes, expected at most {MOST_NBYTES}")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises BadInputError when it is missing or no object."""
    try:
        value = json.loads(read_small(path).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{path}: no JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadInputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value  # pyright: ignore[reportUnknownVariableType]


def _tensors(folder: Path) -> Checkpoint:
    if (folder / INDEX).exists():
        return _indexed(folder, INDEX, read_header)
    if (folder / SINGLE).exists():
        return dict(read_header(folder / SINGLE))
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    if others:
        raise BadInputError(
            f"{folder}: found {', '.join(others[:4])} but neither {SINGLE} nor {INDEX}: the index is missing"
        )
    if (folder / PICKLE_INDEX).exists():
        return _indexed(folder, PICKLE_INDEX, read_pickled_weights)
    if (folder / PICKLE).exists():
        return dict(read_pickled_weights(folder / PICKLE))
    raise BadInputError(f"{folder}: found neither {SINGLE} nor {INDEX}, nor {PICKLE} or its index")


def read_pickled_weights(path: Path) -> dict[str, Stored]:
    """The tensors of a torch.save file (`pytorch_model.bin`), by its directory alone; nothing of the pickle is run.

    Raises BadInputError for anything but a dictionary of contiguous tensors, NotSupportedError for other classes.
    """
    value, storages = read_archive(path)
    if not isinstance(value, dict):
        raise BadInputError(f"{path}: expected a dictionary of tensors, found {type(value).__name__}")
    found: dict[str, Stored] = {}
    entries: dict[Any, Any] = value  # pyright: ignore[reportUnknownVariableType]
    for name, tensor in entries.items():
        if not isinstance(name, str) or not isinstance(tensor, TensorRef):
            raise BadInputError(f"{path}: entry {name!r} is {type(tensor).__name__}, expected a tensor")
        found[name] = stored_tensor(tensor, path, storages, f"{path}: tensor {name!r}")
    return found


def read_index(index: Path) -> dict[str, str]:
    """{tensor: file} of an index. Raises BadInputError for a name that is no file name within the folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInputError(f"{index}: weight_map is missing or empty")
    names: dict[str, Any] = weight_map  # pyright: ignore[reportUnknownVariableType]
    sound: set[str] = set()
    for name, file in names.items():
        if isinstance(file, str) and file in sound:
            continue
        if not is_file_name(file):
            raise BadInputError(
                f"{index}: tensor {name!r} is said to be in {told(file)}, which is no file name within the folder"
            )
        sound.add(file)
    return names


def _indexed(folder: Path, index_name: str, read: Callable[[Path], dict[str, Stored]]) -> Checkpoint:
    index = folder / index_name
    names = read_index(index)
    headers: dict[str, Mapping[str, LazyTensor]] = {}
    for file in sorted(set(names.values())):
        if not (folder / file).is_file():
            owner = next(n for n, f in names.items() if f == file)
            raise BadInputError(f"{index}: tensor {owner!r} is said to be in {file}, which is missing from {folder}")
        headers[file] = read(folder / file)
    return by_index(index, names, headers)


def by_index(index: Path, names: Mapping[str, str], headers: Mapping[str, Mapping[str, LazyTensor]]) -> Checkpoint:
    """The tensors that an index names, in its order, out of the headers of its files.

    Raises BadInputError when two files hold one tensor, or when index and headers do not name the same tensors.
    """
    folder, claimed = index.parent, dict[str, str]()
    for file, header in headers.items():
        for name in header:
            if name in claimed:
                raise BadInputError(f"{folder}: tensor {name!r} stands in both {claimed[name]} and {file}")
            claimed[name] = file
    found: dict[str, LazyTensor] = {}
    for name, file in names.items():
        if name not in headers[file]:
            raise BadInputError(f"{index}: tensor {name!r} is said to be in {file}, which does not hold it")
        found[name] = headers[file][name]
    if extra := [n for n in claimed if n not in names]:
        raise BadInputError(f"{folder / claimed[extra[0]]}: tensor {extra[0]!r} is not named by {index.name}")
    return found
