"""What a Hugging Face folder holds beside its language model: vision towers, projectors, audio parts.

Megatron's side has no place for them, so they lie untouched in a safetensors file beside its config.json, and come
back from there. A config.json that describes several parts has that of the language model as `text_config`; names
of its tensors begin with `language_model.` then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.hf_folder import HfFolder
from ckptbridge.converters.output import OutputFile, Piece
from ckptbridge.converters.safetensors_header import make_header, read_header
from ckptbridge.converters.tensors import Checkpoint, LazyTensor

SIDE_FILE = "passed_through.safetensors"
_LANGUAGE_MODEL = "language_model."
_SHARED = ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config")
"""What the whole config says for its parts as well."""


def set_apart(folder: HfFolder, prefixes: Sequence[str]) -> tuple[HfFolder, Checkpoint]:
    """The language model's part of a folder, with names and config of its own, and what is to be passed through.

    Raises BadInputError for a prefix that no tensor's name begins with.
    """
    if not prefixes:
        return folder, {}
    for prefix in prefixes:
        if not prefix or not any(name.startswith(prefix) for name in folder.tensors):
            raise BadInputError(f"{folder.path}: --pass-through {prefix!r}: no tensor has a name that begins so")
    beside = {name: t for name, t in folder.tensors.items() if name.startswith(tuple(prefixes))}
    config, start = language_config(folder.config)
    own: dict[str, LazyTensor] = {}
    for name, tensor in folder.tensors.items():
        if name in beside:
            continue
        if not name.startswith(start):
            raise BadInputError(
                f"{folder.path}: tensor {name!r} belongs neither to the language model, whose names begin with "
                f"{start!r}, nor to what is passed through: {', '.join(prefixes)}"
            )
        own[name.removeprefix(start)] = tensor
    note = f"{len(beside)} tensors beside the language model are passed through untouched"
    return replace(folder, config=config, tensors=own, notes=(*folder.notes, note)), beside


def language_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """(the language model's own config.json, what names of its tensors begin with)."""
    text: Any = config.get("text_config")
    if not isinstance(text, dict):
        return dict(config), ""
    shared = {name: config[name] for name in _SHARED if name in config}
    return {**shared, **cast(dict[str, Any], text)}, _LANGUAGE_MODEL


def side_file(tensors: Checkpoint, folder: str) -> list[OutputFile]:
    """The file that holds them beside a Megatron checkpoint; none for none."""
    return [safetensors_file(f"{folder}/{SIDE_FILE}", tensors)] if tensors else []


def read_side_file(config_file: Path | None) -> Checkpoint:
    """What lies beside a checkpoint's config.json. Raises BadInputError when the file is spoiled."""
    path = config_file.parent / SIDE_FILE if config_file else None
    return dict(read_header(path)) if path is not None and path.is_file() else {}


def safetensors_file(name: str, tensors: Mapping[str, LazyTensor]) -> OutputFile:
    """A safetensors file of these tensors, in this order."""
    header, offsets = make_header(tensors)
    pieces = [Piece(tensor_name, offsets[tensor_name], tensor) for tensor_name, tensor in tensors.items()]
    size = len(header) + sum(tensor.nbytes for tensor in tensors.values())
    return OutputFile(name, size, pieces, [(0, header)])
