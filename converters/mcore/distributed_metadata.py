"""torch.distributed.checkpoint's `.metadata` without torch.distributed.checkpoint, whose import takes half a second.

These classes have the fields of torch's own (torch/distributed/checkpoint/metadata.py and filesystem.py, 2.11 to
2.13) and are read from and written to a pickle under torch's names.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch


class MemoryFormat(Enum):
    """torch's _MEM_FORMAT_ENCODING."""

    TORCH_CONTIGUOUS_FORMAT = 0
    TORCH_CHANNELS_LAST = 1
    TORCH_PRESERVE_FORMAT = 2


@dataclass
class TensorProperties:
    """What torch keeps of a tensor beside its shape; only the dtype is in use."""

    dtype: torch.dtype
    layout: torch.layout = torch.strided
    requires_grad: bool = False
    memory_format: MemoryFormat = MemoryFormat.TORCH_CONTIGUOUS_FORMAT
    pin_memory: bool = False

    def __getstate__(self) -> tuple[Any, ...]:
        return self.dtype, self.layout, self.requires_grad, self.memory_format, self.pin_memory

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype, self.layout, self.requires_grad, self.memory_format, self.pin_memory = state


@dataclass
class ChunkStorageMetadata:
    offsets: torch.Size
    sizes: torch.Size


@dataclass
class TensorStorageMetadata:
    properties: TensorProperties
    size: torch.Size
    chunks: Iterable[ChunkStorageMetadata]


@dataclass
class BytesStorageMetadata:
    """A key that holds a pickled object."""


@dataclass(frozen=True)
class MetadataIndex:
    """A chunk (`offset` says where it begins in its tensor) or an object; `index` is a hint."""

    fqn: str
    offset: torch.Size | None = None
    index: int | None = field(hash=False, compare=False, default=None)


@dataclass
class StorageInfo:
    """torch's _StorageInfo: where the bytes of a chunk or an object lie."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if value is not None}


@dataclass
class StorageMeta:
    checkpoint_id: Any = None
    save_id: str | None = None
    load_id: str | None = None
    modules: list[str] = field(default_factory=list[str])


@dataclass
class Metadata:
    """The whole of a `.metadata` file."""

    state_dict_metadata: dict[str, TensorStorageMetadata | BytesStorageMetadata]
    planner_data: Any = None
    storage_data: Any = None
    storage_meta: StorageMeta | None = None
    version: str | None = None


_METADATA = "torch.distributed.checkpoint.metadata"
_STORAGE_INFO = "torch.distributed.checkpoint.filesystem._StorageInfo"
NAMES: dict[str, type] = {
    f"{_METADATA}._MEM_FORMAT_ENCODING": MemoryFormat,
    f"{_METADATA}.TensorProperties": TensorProperties,
    f"{_METADATA}.ChunkStorageMetadata": ChunkStorageMetadata,
    f"{_METADATA}.TensorStorageMetadata": TensorStorageMetadata,
    f"{_METADATA}.BytesStorageMetadata": BytesStorageMetadata,
    f"{_METADATA}.MetadataIndex": MetadataIndex,
    f"{_METADATA}.StorageMeta": StorageMeta,
    f"{_METADATA}.Metadata": Metadata,
    "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata": Metadata,  # megatron-core 0.15
    _STORAGE_INFO: StorageInfo,
}
"""What torch, or Megatron in its place, calls each class."""


def pickled(metadata: Metadata) -> bytes:
    """The pickle that torch's own FileSystemReader loads.

    `storage_data`, and the `chunks` of a tensor, may be any iterables (of pairs, of chunks): a model of 671 billion
    parameters cut for TP 8 has 360,000 of them, for which pickle.dumps took 0.9 GB, since it keeps all that it wrote.
    """
    out = _Opcodes()
    fields = {**vars(metadata)}
    tensors, storage = fields.pop("state_dict_metadata"), fields.pop("storage_data")
    out.data += pickle.PROTO + b"\x02"
    out.new(f"{_METADATA}.Metadata")
    out.string("state_dict_metadata")
    out.mapping(tensors.items(), _put_tensor)
    out.string("storage_data")
    out.mapping(storage.items() if isinstance(storage, dict) else storage, _put_storage)  # pyright: ignore
    for name, value in fields.items():
        out.string(name)
        out.data += _small(value)
    out.data += _BUILT + pickle.STOP
    return bytes(out.data)


def _put_tensor(out: _Opcodes, key: str, value: TensorStorageMetadata | BytesStorageMetadata) -> None:
    out.string(key)
    if isinstance(value, BytesStorageMetadata):
        out.global_name(f"{_METADATA}.BytesStorageMetadata")
        out.data += pickle.EMPTY_TUPLE + pickle.NEWOBJ
        return
    out.new(f"{_METADATA}.TensorStorageMetadata")
    out.string("properties")
    out.data += _small(value.properties)
    out.string("size")
    out.size(value.size)
    out.string("chunks")
    out.data += pickle.EMPTY_LIST + pickle.MARK
    for chunk in value.chunks:
        out.new(f"{_METADATA}.ChunkStorageMetadata")
        out.string("offsets")
        out.size(chunk.offsets)
        out.string("sizes")
        out.size(chunk.sizes)
        out.data += _BUILT
    out.data += pickle.APPENDS + _BUILT


def _put_storage(out: _Opcodes, index: MetadataIndex, info: StorageInfo) -> None:
    out.new(f"{_METADATA}.MetadataIndex")
    out.string("fqn")
    out.string(index.fqn)
    out.string("offset")
    out.size(index.offset)
    out.string("index")
    out.number(index.index)
    out.data += _BUILT
    out.new(_STORAGE_INFO)
    out.string("relative_path")
    out.string(info.relative_path)
    out.string("offset")
    out.number(info.offset)
    out.string("length")
    out.number(info.length)
    if info.transform_descriptors is not None:
        out.string("transform_descriptors")
        out.data += _small(info.transform_descriptors)
    out.data += _BUILT


_NEW = pickle.EMPTY_TUPLE + pickle.NEWOBJ + pickle.EMPTY_DICT + pickle.MARK
_BUILT = pickle.SETITEMS + pickle.BUILD
_TUPLES = (pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)
_FIRST_PLACE = 1 << 16
"""Where this file's own references begin; the first places are left to `_small`."""
_MOST_SIZES = 10_000
"""How many shapes and places are remembered as opcodes: most chunks have those of another layer."""


class _Opcodes:
    """A pickle of protocol 2 in the making. A class or string that was written is referred to after that."""

    def __init__(self) -> None:
        self.data = bytearray()
        self._strings: dict[str, bytes] = {}
        self._classes: dict[str, bytes] = {}
        self._sizes: dict[Sequence[int], bytes] = {}

    def _once(self, known: dict[str, bytes], name: str, opcodes: bytes) -> None:
        place = (_FIRST_PLACE + len(self._strings) + len(self._classes)).to_bytes(4, "little")
        known[name] = pickle.LONG_BINGET + place
        self.data += opcodes + pickle.LONG_BINPUT + place

    def string(self, text: str) -> None:
        if (known := self._strings.get(text)) is not None:
            self.data += known
            return
        encoded = text.encode()
        self._once(self._strings, text, pickle.BINUNICODE + len(encoded).to_bytes(4, "little") + encoded)

    def global_name(self, name: str) -> None:
        """A class by its dotted name."""
        if (known := self._classes.get(name)) is not None:
            self.data += known
            return
        module, _, own = name.rpartition(".")
        self._once(self._classes, name, _global(module, own))

    def new(self, name: str) -> None:
        """An object without fields, and the opening of the dictionary of its fields: _BUILT closes it."""
        self.global_name(name)
        self.data += _NEW

    def mapping(self, items: Iterable[tuple[Any, Any]], put: Callable[[_Opcodes, Any, Any], None]) -> None:
        self.data += pickle.EMPTY_DICT + pickle.MARK
        for count, (key, value) in enumerate(items, 1):
            put(self, key, value)
            if count % 1000 == 0:  # what reads it keeps on a stack what is not yet in the dictionary
                self.data += pickle.SETITEMS + pickle.MARK
        self.data += pickle.SETITEMS

    def number(self, value: int | None) -> None:
        self.data += pickle.NONE if value is None else _number(value)

    def size(self, size: Sequence[int] | None) -> None:
        if size is None:
            self.data += pickle.NONE
            return
        self.global_name("torch.Size")
        known = self._sizes.get(size)
        if known is None:
            opening, closing = (b"", _TUPLES[len(size)]) if len(size) <= 3 else (pickle.MARK, pickle.TUPLE)
            known = opening + b"".join(map(_number, size)) + closing + pickle.TUPLE1 + pickle.REDUCE
            if len(self._sizes) < _MOST_SIZES:
                self._sizes[size] = known
        self.data += known


def _number(value: int) -> bytes:
    if 0 <= value < 1 << 31:
        return pickle.BININT + value.to_bytes(4, "little")
    return pickle.LONG1 + b"\x09" + value.to_bytes(9, "little", signed=True)


def _small(value: Any) -> bytes:
    """Opcodes that leave a value of few parts.

    Protocol 2 writes a class as `c<module>\\n<name>\\n`. No other value can hold these bytes: keys, file names and
    ids have no line ends.
    """
    data = pickle.dumps(value, protocol=2)
    for name, ours in NAMES.items():
        module, _, theirs = name.rpartition(".")
        data = data.replace(_global(ours.__module__, ours.__qualname__), _global(module, theirs))
    return data[2:-1]


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()
