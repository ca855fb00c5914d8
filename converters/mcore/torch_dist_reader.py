"""Megatron-Core's `torch_dist` folder, read without megatron: metadata first, tensors when they are wanted.

Format: megatron-core 0.13 to 0.19, torch.distributed.checkpoint's `.metadata` and `.distcp` files, Megatron's
keys and objects (`common_state`, `_extra_state`), tracker and folder names of Megatron-LM.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from ckptbridge.converters.errors import BadInputError, NotSupportedError, StorageError
from ckptbridge.converters.hf_folder import read_json
from ckptbridge.converters.mapping import Family
from ckptbridge.converters.mcore.keys import state_prefix
from ckptbridge.converters.mcore.megatron_folder import OPTIMIZER_STATES
from ckptbridge.converters.mcore.parameters import is_optimizer_key, parameters_of
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.pickles import TensorRef, read_pickle
from ckptbridge.converters.tensors import (
    Checkpoint,
    Extent,
    LazyTensor,
    Stored,
    columns,
    join_columns,
    join_rows,
    rows,
)
from ckptbridge.converters.torch_archive import read_archive, stored_tensor

TRACKER = "latest_checkpointed_iteration.txt"
COMMON_KEY = "common_state/shard_0_1"


@dataclass(frozen=True, slots=True)
class Chunk:
    """A saved part of a global tensor: one torch archive in a `.distcp` file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    at: int
    nbytes: int


@dataclass(slots=True)
class GlobalTensor:
    """A key of the checkpoint: its whole shape, and the chunks that tile it."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[Chunk] = field(default_factory=list[Chunk])
    _by_index: dict[int, dict[tuple[int, ...], list[Chunk]]] = field(default_factory=dict)  # pyright: ignore

    def part(self, index: tuple[int, ...]) -> LazyTensor:
        """Entry `index` of the leading axes as one lazy tensor. Raises BadInputError when chunks do not tile it."""
        depth = len(index)
        shape = self.shape[depth:]
        boxes = [_Saved(self, chunk, index) for chunk in self._chunks_at(index)]
        boxes.sort(key=lambda box: box.corner)
        if not shape:
            raise BadInputError(f"{self.key}: expected more than {depth} axes, found shape {list(self.shape)}")
        bands: list[LazyTensor] = []
        row = 0
        while row < shape[0]:
            band = [b for b in boxes if b.corner[0] <= row < b.corner[0] + b.shape[0]]
            stop = min((b.corner[0] + b.shape[0] for b in band), default=row)
            stop = min([stop, *(b.corner[0] for b in boxes if b.corner[0] > row)])
            bands.append(self._band(band, row, stop, shape))
            row = stop
        return join_rows(bands)

    def saved(self, chunk: Chunk) -> LazyTensor:
        """One chunk as the file holds it."""
        return _Saved(self, chunk, ())

    def _band(self, band: list[_Saved], row: int, stop: int, shape: tuple[int, ...]) -> LazyTensor:
        """Rows [row, stop) from chunks that stand side by side."""
        if stop > row and (len(shape) == 1 or len(band) == 1) and band[0].shape[1:] == shape[1:]:
            return rows(band[0], row - band[0].corner[0], stop - band[0].corner[0])
        parts: list[LazyTensor] = []
        column = 0
        for box in sorted(band, key=lambda b: b.corner[1:]):
            (top, left), width = box.corner[:2], box.shape[1]
            if left > column:
                break
            if left + width > column:
                cut = columns(box, column - left, width)
                parts.append(rows(cut, row - top, stop - top))
                column = left + width
        if not parts or column < prod(shape[1:2]):
            raise BadInputError(f"{self.key}: no chunk holds row {row}, column {column} of shape {list(self.shape)}")
        return join_columns(parts)

    def _chunks_at(self, index: tuple[int, ...]) -> list[Chunk]:
        """The chunks that hold entry `index`, looked up by the leading offsets when chunks are one entry each."""
        depth = len(index)
        if not depth:
            return self.chunks
        if depth not in self._by_index:
            table: dict[tuple[int, ...], list[Chunk]] = {}
            if all(size == 1 for chunk in self.chunks for size in chunk.sizes[:depth]):
                for chunk in self.chunks:
                    table.setdefault(chunk.offsets[:depth], []).append(chunk)
            self._by_index[depth] = table
        if hit := self._by_index[depth].get(index):
            return hit
        return [
            chunk
            for chunk in self.chunks
            if all(o <= i < o + s for i, o, s in zip(index, chunk.offsets, chunk.sizes, strict=False))
        ]


class _Saved(LazyTensor):
    """One chunk's entry `index`; its archive is opened when the bytes are wanted."""

    def __init__(self, whole: GlobalTensor, chunk: Chunk, index: tuple[int, ...]) -> None:
        depth = len(index)
        self.chunk, self.key, self.dtype = chunk, whole.key, whole.dtype
        self.shape, self.corner = chunk.sizes[depth:], chunk.offsets[depth:]
        local = [i - o for i, o in zip(index, chunk.offsets, strict=False)]
        self._elements_before = sum(at * prod(chunk.sizes[axis + 1 :]) for axis, at in enumerate(local))

    @cached_property
    def _stored(self) -> Stored:
        where = f"{self.chunk.path}: tensor {self.key}"
        try:
            value, storages = read_archive(self.chunk.path, self.chunk.at, self.chunk.nbytes)
        except BadInputError as error:
            raise type(error)(f"tensor {self.key}: {error}") from error
        if not isinstance(value, TensorRef):
            raise BadInputError(f"{where}: expected a tensor, found {type(value).__name__}")
        stored = stored_tensor(value, self.chunk.path, storages, where)
        if stored.shape != self.chunk.sizes or stored.dtype != self.dtype:
            raise BadInputError(
                f"{where}: the metadata says {list(self.chunk.sizes)} {self.dtype}, the file holds "
                f"{list(stored.shape)} {stored.dtype}"
            )
        return Stored(stored.path, stored.offset + self._elements_before * self.dtype.itemsize, self.shape, self.dtype)

    def read_rows(self, start: int, stop: int) -> Tensor:
        return self._stored.read_rows(start, stop)

    def extents(self) -> Sequence[Extent]:
        return self._stored.extents()


@dataclass(frozen=True, slots=True)
class TorchDistFolder:
    """An opened checkpoint: its tensors by key, its objects' keys, and what `common_state` holds."""

    path: Path
    tensors: dict[str, GlobalTensor]
    objects: frozenset[str]
    common: dict[str, Any]

    @property
    def args(self) -> Namespace | None:
        args = self.common.get("args")
        return args if isinstance(args, Namespace) else None

    def states(self) -> tuple[str, ...]:
        """Which states of the optimizer are there."""
        return tuple(s for s in OPTIMIZER_STATES if any(key.startswith(state_prefix(s)) for key in self.tensors))

    def parameters(self, family: Family, config: ModelConfig, state: str = "") -> dict[str, LazyTensor]:
        """One state of every parameter, unsplit: see MegatronFolder."""
        return parameters_of(self, family, config, state)

    def sources(self) -> Checkpoint:
        """The weights' chunks as the files hold them, named key@offsets."""
        return {
            f"{key}@{','.join(map(str, chunk.offsets))}": whole.saved(chunk)
            for key, whole in self.tensors.items()
            if not is_optimizer_key(key)
            for chunk in whole.chunks
        }


def iteration_folder(path: Path) -> Path:
    """The folder of the newest checkpoint under `path`, or `path` itself when it is one.

    Raises BadInputError when the tracker names a folder that is missing, or there is nothing to read.
    """
    if (path / ".metadata").exists() or (path / "metadata.json").exists() or any(path.glob("mp_rank_*")):
        return path
    tracker = path / TRACKER
    if not tracker.exists():
        raise BadInputError(f"{path}: no checkpoint: neither {TRACKER}, .metadata, config.json nor mp_rank_* is there")
    word = tracker.read_text(errors="replace").strip()
    if word != "release" and not re.fullmatch(r"\d{1,9}", word):
        raise BadInputError(f"{tracker}: expected an iteration or 'release', found {word[:40]!r}")
    folder = path / (word if word == "release" else f"iter_{int(word):07d}")
    if not folder.is_dir():
        raise BadInputError(f"{tracker} names {word}, but {folder} is missing")
    return folder


def open_torch_dist(folder: Path) -> TorchDistFolder:
    """Open one iteration's folder. Reads `.metadata` and `common_state` (or `common.pt`), no tensor.

    Raises BadInputError when a file is missing, shorter than the metadata says, or chunks lie outside their tensor.
    """
    if (folder / "metadata.json").exists():
        backend = read_json(folder / "metadata.json").get("sharded_backend")
        if backend != "torch_dist":
            raise NotSupportedError(
                f"{folder / 'metadata.json'}: sharded_backend is {backend!r}; supported: 'torch_dist'"
            )
    else:
        raise BadInputError(
            f"{folder}: metadata.json is missing: Megatron writes it last, so this checkpoint is incomplete"
        )
    metadata_file = folder / ".metadata"
    try:
        metadata = read_pickle(metadata_file.read_bytes(), str(metadata_file))
    except FileNotFoundError as error:
        raise BadInputError(f"{metadata_file}: the file is missing") from error
    except OSError as error:
        raise StorageError(f"{metadata_file}: cannot be read: {error.strerror}") from error
    if not isinstance(metadata, Metadata):
        raise BadInputError(f"{metadata_file}: expected torch.distributed.checkpoint's Metadata")
    try:
        return _described(folder, metadata)
    except (AttributeError, TypeError, ValueError, KeyError, OverflowError) as error:
        raise BadInputError(f"{metadata_file}: an entry is not what its place asks for: {error}") from error


def _described(folder: Path, metadata: Metadata) -> TorchDistFolder:
    metadata_file = folder / ".metadata"
    places: dict[str, dict[tuple[int, ...] | None, Any]] = {}
    for index, info in dict(metadata.storage_data).items():  # pyright: ignore
        offset = None if index.offset is None else tuple(index.offset)  # pyright: ignore
        places.setdefault(index.fqn, {})[offset] = info  # pyright: ignore
    tensors: dict[str, GlobalTensor] = {}
    objects: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            try:
                tensors[key] = _global_tensor(folder, key, entry, places.get(key, {}), sizes)
            except (AttributeError, TypeError, ValueError, OverflowError) as error:
                raise BadInputError(f"{metadata_file}: tensor {key!r} is described wrongly: {error}") from error
        elif isinstance(entry, BytesStorageMetadata):  # pyright: ignore[reportUnnecessaryIsInstance]
            if not places.get(key):
                raise BadInputError(f"{metadata_file}: object {key!r} is stored nowhere")
            objects[key] = next(iter(places[key].values()))
    return TorchDistFolder(folder, tensors, frozenset(objects), _common(folder, objects))


def _global_tensor(
    folder: Path, key: str, entry: TensorStorageMetadata, places: dict[Any, Any], sizes: dict[str, int]
) -> GlobalTensor:
    shape = tuple(entry.size)
    where = f"{folder / '.metadata'}: tensor {key!r}"
    dtype: Any = entry.properties.dtype
    if not isinstance(dtype, torch.dtype):
        raise BadInputError(f"{where}: its dtype is {dtype!r}")
    whole = GlobalTensor(key, shape, dtype)
    covered = 0
    for chunk in entry.chunks:
        offsets, extent = tuple(chunk.offsets), tuple(chunk.sizes)
        if len(offsets) != len(shape) or any(
            o < 0 or n < 0 or o + n > s for o, n, s in zip(offsets, extent, shape, strict=True)
        ):
            raise BadInputError(
                f"{where}: a chunk at {list(offsets)} of {list(extent)} lies outside shape {list(shape)}"
            )
        info = places.get(offsets)
        if info is None:
            raise BadInputError(f"{where}: the chunk at {list(offsets)} is stored nowhere")
        path = _file(folder, info.relative_path, where, sizes)
        if info.offset < 0 or info.length < 0 or info.offset + info.length > sizes[info.relative_path]:
            raise BadInputError(
                f"{path}: tensor {key!r} ends at byte {info.offset + info.length}, the file at "
                f"{sizes[info.relative_path]}: it is truncated"
            )
        whole.chunks.append(Chunk(offsets, extent, path, info.offset, info.length))
        covered += prod(extent)
    if covered != prod(shape):
        raise BadInputError(f"{where}: its chunks hold {covered} elements, its shape {list(shape)} has {prod(shape)}")
    return whole


def _file(folder: Path, name: Any, where: str, sizes: dict[str, int]) -> Path:
    if not isinstance(name, str) or Path(name).name != name:
        raise BadInputError(f"{where}: its file is said to be {name!r}, which is no file name within the folder")
    path = folder / name
    if name not in sizes:
        try:
            sizes[name] = path.stat().st_size
        except FileNotFoundError as error:
            raise BadInputError(f"{where} is said to be in {name}, which is missing from {folder}") from error
    return path


def _common(folder: Path, objects: dict[str, Any]) -> dict[str, Any]:
    """Megatron prefers `common.pt` where both are there."""
    if (folder / "common.pt").exists():
        value, _ = read_archive(folder / "common.pt")
    elif COMMON_KEY in objects:
        info = objects[COMMON_KEY]
        value, _ = read_archive(_file(folder, info.relative_path, COMMON_KEY, {}), info.offset, info.length)
        value = value[0] if isinstance(value, list) and value else value  # pyright: ignore
    else:
        return {}
    if not isinstance(value, dict):
        raise BadInputError(f"{folder}: the common state is {type(value).__name__}, expected a dictionary")  # pyright: ignore
    return value  # pyright: ignore
