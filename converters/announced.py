"""A Hugging Face folder whose shards are not here: its tensors as config.json and the index announce them.

Names and files come from the index, shapes from the config, the dtype from the config. That is all that a plan needs:
the plan of a model of 671 billion parameters takes a config and an index of 5 MB.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.fields import read_config
from ckptbridge.converters.fp8_folder import QUANTIZATION_CONFIG, SCALE_SUFFIX, block_size_of, without_quantisation
from ckptbridge.converters.further_layers import as_saved_by_hf
from ckptbridge.converters.fused_experts import stack_shapes
from ckptbridge.converters.hf_folder import (
    INDEX,
    PICKLE_INDEX,
    HfFolder,
    find_assets,
    read_index,
    read_json,
)
from ckptbridge.converters.mxfp4 import is_mxfp4, packed_shape
from ckptbridge.converters.registry import family_of
from ckptbridge.converters.tensors import Checkpoint, LazyTensor

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


class Announced(LazyTensor):
    """A tensor that a file is said to hold. It can be planned with; reading it is refused."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.path, self.shape, self.dtype = path, shape, dtype

    def read_rows(self, start: int, stop: int) -> Tensor:
        raise BadInputError(
            f"{self.path}: is not here; only the index that names it was read, which is enough for a plan but not for "
            "a conversion. Download the file, or name the model by its Hub id"
        )


def refuse_announced(tensors: Checkpoint) -> None:
    """Raises BadInputError when these are only announced: a plan of them can be printed, not carried out."""
    first = next(iter(tensors.values()), None)
    if isinstance(first, Announced):
        first.read()


def is_announced_only(folder: Path) -> bool:
    """Whether a folder holds a config and an index, but none of the files that the index names."""
    index = _index_of(folder)
    if index is None or not (folder / "config.json").is_file():
        return False
    return not any((folder / file).exists() for file in set(read_index(folder / index).values()))


def open_announced(
    folder: Path, *, ignore_config_fields: Iterable[str] = (), assets: tuple[Path, ...] | None = None
) -> HfFolder:
    """Open a folder by config.json and index alone. `assets` are those that it would have, if they are not here either.

    Raises BadInputError when the config says nothing of the dtype: then only the headers of the shards can tell.
    """
    config, index = read_json(folder / "config.json"), _index_of(folder)
    if index is None:
        raise BadInputError(f"{folder}: found neither {INDEX} nor {PICKLE_INDEX}, which name the tensors")
    where = str(folder / "config.json")
    family = family_of(config, where)
    model = read_config(family.fields, without_quantisation(config), where, ignore_config_fields)
    weight_map = read_index(folder / index)
    model, _ = as_saved_by_hf(model, weight_map)
    if not tells_dtype(config):
        raise BadInputError(
            f"{where}: dtype (torch_dtype) is {_dtype_name(config)!r}; a plan without the shards needs one of "
            f"{', '.join(_DTYPES)}"
        )
    dtype, scales = _DTYPES[_dtype_name(config)], _Scales(config, where, ignore_config_fields)
    shapes = {name: shape for move in family.moves(model) for name, shape in zip(move.hf, move.hf_shapes, strict=True)}
    shapes |= {copy: shapes[original] for copy, original in family.copied(model).items()}
    if any(name not in shapes for name in weight_map):
        shapes = {**stack_shapes(family, model), "lm_head.weight": (model.vocab_size, model.hidden_size), **shapes}
    # What the table does not know has no shape that could be known, and is refused by its name.
    tensors: dict[str, LazyTensor] = {
        name: Announced(folder / file, *scales.form(name, weight_map, shapes, dtype))
        for name, file in weight_map.items()
    }
    notes = [
        "the shards were not read: names are the index's, shapes and dtype the config's",
        *_total_size_note(folder / index, tensors, shapes),
    ]
    if model.share_embeddings_and_output_weights and tensors.pop("lm_head.weight", None) is not None:
        notes.append("lm_head.weight beside a tied embedding: it is compared when the model is converted, and left out")
    return HfFolder(folder, config, tensors, find_assets(folder) if assets is None else assets, tuple(notes))


def tells_dtype(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says in which dtype the weights are."""
    return _dtype_name(config) in _DTYPES


def _dtype_name(config: Mapping[str, Any]) -> str:
    return str(config.get("dtype") or config.get("torch_dtype"))


class _Scales:
    """The form of each tensor where weights may be quantised: MXFP4, or fp8 where a tensor of scales is beside them."""

    def __init__(self, config: Mapping[str, Any], where: str, ignore: Iterable[str]) -> None:
        self._is_mxfp4 = is_mxfp4(config, where)
        self._block = None if self._is_mxfp4 or QUANTIZATION_CONFIG in ignore else block_size_of(config, where)

    def form(
        self, name: str, names: Collection[str], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """(shape, dtype). A tensor that no shape is known of has none: it is going to be refused by its name."""
        if self._is_mxfp4 and (shape := packed_shape(name, shapes)) is not None:
            return shape, torch.uint8
        if self._block is not None and name.endswith(SCALE_SUFFIX):
            shape = shapes.get(name.removesuffix(SCALE_SUFFIX), ())
            return self._block.grid(shape) if len(shape) > 1 else (), torch.float32
        if self._block is not None and name + SCALE_SUFFIX in names:
            return shapes.get(name, ()), torch.float8_e4m3fn
        return shapes.get(name, ()), dtype


def _index_of(folder: Path) -> str | None:
    return next((name for name in (INDEX, PICKLE_INDEX) if (folder / name).is_file()), None)


def _total_size_note(index: Path, tensors: Mapping[str, LazyTensor], known: Collection[str]) -> list[str]:
    """What to say when the index counts other bytes than the config does."""
    metadata: Any = read_json(index).get("metadata")
    told: Any = metadata.get("total_size") if isinstance(metadata, dict) else None  # pyright: ignore
    found = sum(tensor.nbytes for tensor in tensors.values())
    if told is None or told == found or any(name not in known for name in tensors):
        return []
    return [
        f"{index}: total_size is {told}, but the config's shapes and dtype come to {found} bytes: the files hold "
        "another dtype or another model than config.json says"
    ]
