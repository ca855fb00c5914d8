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

from ckptbridge.converters.errors import BadInputError, NotSupportedError, told
from ckptbridge.converters.hf_folder import read_json
from ckptbridge.converters.mapping import Family
from ckptbridge.converters.mcore.distributed_metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from ckptbridge.converters.mcore.megatron_folder import OPTIMIZER_STATES
from ckptbridge.converters.mcore.parameters import is_optimizer_key, keys_of_state, parameters_of
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.pickles import TensorRef, read_pickle
from ckptbridge.converters.small_files import is_file_name, read_small
from ckptbridge.converters.tensors import (
    Checkpoint,
    Extent,
    LazyTensor,
    Stored,
    columns,
    join_columns,
    join_rows,
    read_exactly,
    rows,
)
from ckptbridge.converters.torch_archive import read_archive, read_small_tensors, stored_tensor

_MOST_AXES, _LARGEST = 64, 1 << 62
_MOST_METADATA_NBYTES = 1 << 31
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
    opened: dict[tuple[int, ...], Stored] = field(default_factory=dict[tuple[int, ...], Stored])
    """Chunks whose archives were opened, by their offsets."""
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
            folder = self.chunks[0].path.parent if self.chunks else ""
            raise BadInputError(
                f"{folder}: tensor {self.key}: no chunk holds row {row}, column {column} of shape {list(self.shape)}"
            )
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
        self.whole, self.chunk, self.dtype = whole, chunk, whole.dtype
        self.shape, self.corner = chunk.sizes[depth:], chunk.offsets[depth:]
        local = [i - o for i, o in zip(index, chunk.offsets, strict=False)]
        self._elements_before = sum(at * prod(chunk.sizes[axis + 1 :]) for axis, at in enumerate(local))

    @cached_property
    def _stored(self) -> Stored:
        opened = self.whole.opened
        if (stored := opened.get(self.chunk.offsets)) is None:
            stored = opened[self.chunk.offsets] = self._open()
        return Stored(stored.path, stored.offset + self._elements_before * self.dtype.itemsize, self.shape, self.dtype)

    def _open(self) -> Stored:
        """The chunk itself."""
        where = f"{self.chunk.path}: tensor {self.whole.key}"
        try:
            value, storages = read_archive(self.chunk.path, self.chunk.at, self.chunk.nbytes)
        except BadInputError as error:
            raise type(error)(f"tensor {self.whole.key}: {error}") from error
        if not isinstance(value, TensorRef):
            raise BadInputError(f"{where}: expected a tensor, found {type(value).__name__}")
        stored = stored_tensor(value, self.chunk.path, storages, where)
        if stored.shape != self.chunk.sizes or stored.dtype != self.dtype:
            raise BadInputError(
                f"{where}: the metadata says {list(self.chunk.sizes)} {self.dtype}, the file holds "
                f"{list(stored.shape)} {stored.dtype}"
            )
        return stored

    def read_rows(self, start: int, stop: int) -> Tensor:
        return self._stored.read_rows(start, stop)

    def extents(self) -> Sequence[Extent]:
        return self._stored.extents()


@dataclass(frozen=True, slots=True)
class TorchDistFolder:
    """An opened checkpoint: its tensors by key, where its objects are stored, and what `common_state` holds."""

    path: Path
    tensors: dict[str, GlobalTensor]
    objects: dict[str, Any]
    common: dict[str, Any]

    @property
    def args(self) -> Namespace | None:
        args = self.common.get("args")
        return args if isinstance(args, Namespace) else None

    def states(self) -> tuple[str, ...]:
        """Which states of the optimizer are there."""
        return tuple(state for state in OPTIMIZER_STATES if keys_of_state(self.tensors, state))

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

    def optimizer_sources(self) -> Checkpoint:
        """The optimizer's chunks as the files hold them, named key@offsets."""
        return {
            f"{key}@{','.join(map(str, chunk.offsets))}": whole.saved(chunk)
            for key, whole in self.tensors.items()
            if is_optimizer_key(key)
            for chunk in whole.chunks
        }

    def read_object(self, key: str) -> bytes:
        """The saved bytes of one of `objects`. Raises BadInputError when they do not lie within their file."""
        path, offset, length = self._place(key)
        blob = bytearray(length)
        read_exactly(path, offset, memoryview(blob))
        return bytes(blob)

    def load_object(self, key: str) -> Any:
        """One of `objects`, unpickled as far as that is safe. Raises BadInputError as `read_object` does."""
        path, offset, length = self._place(key)
        value, storages = read_archive(path, offset, length)
        read_small_tensors(value, path, storages)
        return value

    def _place(self, key: str) -> tuple[Path, int, int]:
        info = self.objects[key]
        return _within_file(self.path, info, "object", key, {}), info.offset, info.length


def iteration_folder(path: Path) -> Path:
    """The folder of the newest checkpoint under `path`, or `path` itself when it is one.

    Raises BadInputError when the tracker names a folder that is missing, or there is nothing to read.
    """
    if (path / ".metadata").exists() or (path / "metadata.json").exists() or any(path.glob("mp_rank_*")):
        return path
    tracker = path / TRACKER
    if not tracker.exists():
        raise BadInputError(f"{path}: no checkpoint: neither {TRACKER}, .metadata, config.json nor mp_rank_* is there")
    word = read_small(tracker).decode(errors="replace").strip()
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
                f"{folder / 'metadata.json'}: sharded_backend is {told(backend)}; supported: 'torch_dist'"
            )
    else:
        raise BadInputError(
            f"{folder}: metadata.json is missing: Megatron writes it last, so this checkpoint is incomplete"
        )
    return open_distributed(folder)


def open_distributed(folder: Path) -> TorchDistFolder:
    """Open any folder of torch.distributed.checkpoint, of which torch_dist is one. Reads as `open_torch_dist` does.

    Raises BadInputError when a file is missing, shorter than the metadata says, or chunks lie outside their tensor.
    """
    metadata_file = folder / ".metadata"
    metadata = read_pickle(read_small(metadata_file, _MOST_METADATA_NBYTES), str(metadata_file))
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
        if not isinstance(index.fqn, str):  # pyright: ignore
            raise BadInputError(f"{metadata_file}: a place is said to be that of {told(index.fqn)}, which is no key")  # pyright: ignore
        offset = None if index.offset is None else _counts(index.offset, negative=True)  # pyright: ignore
        places.setdefault(index.fqn, {})[offset] = info
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
            _within_file(folder, objects[key], "object", key, sizes)
    return TorchDistFolder(folder, tensors, objects, _common(folder, objects))


def _global_tensor(
    folder: Path, key: str, entry: TensorStorageMetadata, places: dict[Any, Any], sizes: dict[str, int]
) -> GlobalTensor:
    shape = _counts(entry.size)
    where = f"{folder / '.metadata'}: tensor {key!r}"
    dtype: Any = entry.properties.dtype
    if not isinstance(dtype, torch.dtype):
        raise BadInputError(f"{where}: its dtype is {told(dtype)}")
    whole = GlobalTensor(key, shape, dtype)
    covered = 0
    for chunk in entry.chunks:
        offsets, extent = _counts(chunk.offsets, negative=True), _counts(chunk.sizes, negative=True)
        if len(offsets) != len(shape) or any(
            o < 0 or n < 0 or o + n > s for o, n, s in zip(offsets, extent, shape, strict=True)
        ):
            raise BadInputError(
                f"{where}: a chunk at {list(offsets)} of {list(extent)} lies outside shape {list(shape)}"
            )
        info = places.get(offsets)
        if info is None:
            raise BadInputError(f"{where}: the chunk at {list(offsets)} is stored nowhere")
        path = _within_file(folder, info, "tensor", key, sizes)
        whole.chunks.append(Chunk(offsets, extent, path, info.offset, info.length))
        covered += prod(extent)
    if covered != prod(shape):
        raise BadInputError(f"{where}: its chunks hold {covered} elements, its shape {list(shape)} has {prod(shape)}")
    return whole


def _counts(values: Any, *, negative: bool = False) -> tuple[int, ...]:
    """The sizes or offsets of a tensor. Raises ValueError for what cannot be any."""
    counts: tuple[Any, ...] = tuple(values)
    if len(counts) > _MOST_AXES or not all(
        type(n) is int and abs(n) < _LARGEST and (negative or n >= 0) for n in counts
    ):
        raise ValueError(f"{told(counts)} are no sizes or offsets")
    return counts


def _within_file(folder: Path, info: Any, kind: str, key: str, sizes: dict[str, int]) -> Path:
    """The file that holds a chunk or an object. Raises BadInputError where it ends before them."""
    path = _file(folder, info.relative_path, f"{folder / '.metadata'}: {kind} {key!r}", sizes)
    start, nbytes = _counts((info.offset, info.length), negative=True)
    if start < 0 or nbytes < 0 or start + nbytes > sizes[info.relative_path]:
        size = sizes[info.relative_path]
        raise BadInputError(
            f"{path}: {kind} {key!r} ends at byte {start + nbytes}, the file at {size}: it is truncated"
        )
    return path


def _file(folder: Path, name: Any, where: str, sizes: dict[str, int]) -> Path:
    if not is_file_name(name):
        raise BadInputError(f"{where}: its file is said to be {told(name)}, which is no file name within the folder")
    path = folder / name
    if name not in sizes:
        try:
            sizes[name] = path.stat().st_size
        except OSError as error:
            raise BadInputError(f"{where} is said to be in {name}, which is missing from {folder}") from error
    return path


def _common(folder: Path, objects: dict[str, Any]) -> dict[str, Any]:
    """Megatron prefers `common.pt` where both are there."""
    if (folder / "common.pt").exists():
        file = folder / "common.pt"
        value, storages = read_archive(file)
    elif COMMON_KEY in objects:
        info = objects[COMMON_KEY]
        file = _file(folder, info.relative_path, COMMON_KEY, {})
        value, storages = read_archive(file, info.offset, info.length)
        value = value[0] if isinstance(value, list) and value else value  # pyright: ignore
    else:
        return {}
    read_small_tensors(value, file, storages)
    if not isinstance(value, dict):
        raise BadInputError(f"{file}: the common state is {type(value).__name__}, expected a dictionary")  # pyright: ignore
    return value  # pyright: ignore
