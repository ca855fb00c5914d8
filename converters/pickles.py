"""A pickle reader that runs nothing: only the classes that checkpoint files need are admitted, by name.

`torch.load(weights_only=True)` admits what torch chose; Megatron's files also hold an argparse.Namespace, DCP's
metadata classes and enums of megatron itself. Enums and recipes of megatron become inert values, so that a
checkpoint is read without megatron being there. Anything else is refused with its name.
"""

from __future__ import annotations

import _compat_pickle
import argparse
import collections
import io
import pathlib
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed.checkpoint.filesystem as dcp_filesystem
import torch.distributed.checkpoint.metadata as dcp_metadata
import torch.distributed.checkpoint.planner as dcp_planner

from ckptbridge.converters.errors import BadInputError, NotSupportedError


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A tensor's storage that has not been read: the entry `data/{key}` of the zip archive."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor that has not been read: a strided view of a storage."""

    storage: StorageRef
    storage_offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Inert:
    """A value of a class that is not imported: its name and what it was built from."""

    name: str
    arguments: tuple[Any, ...] = ()

    def __setstate__(self, state: Any) -> None:
        """Accept and forget: an inert value has no behaviour."""


_STORAGE_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}

_INERT_PREFIXES = ("megatron.core.", "megatron.training.", "megatron.bridge.", "transformer_engine.")
_INERT_NAMES = {"signal.Signals", "enum.Enum", "torch.nn.functional.silu", "torch.nn.functional.gelu"}


def _rebuild_tensor(storage: Any, offset: int, shape: Any, stride: Any, *_: Any) -> TensorRef:
    if not isinstance(storage, StorageRef):
        raise BadInputError(f"a tensor is built from {type(storage).__name__}, which is no storage")
    return TensorRef(storage, offset, tuple(shape), tuple(stride))


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _encode(text: str, encoding: str = "utf-8") -> bytes:
    return text.encode(encoding)


_ADMITTED: dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace,
    "collections.OrderedDict": collections.OrderedDict,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.complex": complex,
    "builtins.bytearray": bytearray,
    "builtins.slice": slice,
    "builtins.range": range,
    "_codecs.encode": _encode,
    "pathlib.PosixPath": pathlib.PurePosixPath,
    "pathlib.PurePosixPath": pathlib.PurePosixPath,
    "pathlib.Path": pathlib.PurePosixPath,
    "pathlib._local.PosixPath": pathlib.PurePosixPath,
    "torch.Size": torch.Size,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch.serialization._get_layout": torch.serialization._get_layout,  # pyright: ignore
    "torch.distributed.checkpoint.metadata.Metadata": dcp_metadata.Metadata,
    "torch.distributed.checkpoint.metadata.MetadataIndex": dcp_metadata.MetadataIndex,
    "torch.distributed.checkpoint.metadata.StorageMeta": dcp_metadata.StorageMeta,
    "torch.distributed.checkpoint.metadata.TensorStorageMetadata": dcp_metadata.TensorStorageMetadata,
    "torch.distributed.checkpoint.metadata.BytesStorageMetadata": dcp_metadata.BytesStorageMetadata,
    "torch.distributed.checkpoint.metadata.ChunkStorageMetadata": dcp_metadata.ChunkStorageMetadata,
    "torch.distributed.checkpoint.metadata.TensorProperties": dcp_metadata.TensorProperties,
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING": dcp_metadata._MEM_FORMAT_ENCODING,  # pyright: ignore
    "torch.distributed.checkpoint.filesystem._StorageInfo": dcp_filesystem._StorageInfo,  # pyright: ignore
    "torch.distributed.checkpoint.planner.SavePlan": dcp_planner.SavePlan,
    "torch.distributed.checkpoint.planner.WriteItem": dcp_planner.WriteItem,
    "torch.distributed.checkpoint.planner.WriteItemType": dcp_planner.WriteItemType,
    "torch.distributed.checkpoint.planner.TensorWriteData": dcp_planner.TensorWriteData,
}


_PYTHON_2_MODULES = _compat_pickle.IMPORT_MAPPING
_PYTHON_2_NAMES = _compat_pickle.NAME_MAPPING
"""Protocol 2, which torch writes, has Python 2's names."""


class _Reader(pickle.Unpickler):
    def __init__(self, data: bytes, where: str) -> None:
        super().__init__(io.BytesIO(data))
        self._where = where
        self._given: dict[str, Any] = {}

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        old = (module_name, global_name)
        name = ".".join(_PYTHON_2_NAMES.get(old, (_PYTHON_2_MODULES.get(module_name, module_name), global_name)))
        if name in _ADMITTED:
            return self._throwaway(name)
        if module_name in ("torch", "torch.storage") and global_name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[global_name]
        if module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype):
            return getattr(torch, global_name)
        if module_name.startswith(_INERT_PREFIXES) or name in _INERT_NAMES:
            return _inert(name)
        raise NotSupportedError(
            f"{self._where}: the pickle asks for {name}, which no checkpoint needs; it was not loaded. "
            "If you trust the file and need it, tell us the name"
        )

    def _throwaway(self, name: str) -> Any:
        """The admitted class or function as one of this reader's own: a pickle may set attributes of what it names."""
        if name not in self._given:
            admitted = _ADMITTED[name]
            if (
                isinstance(admitted, type)
                and type(admitted) is type
                and admitted.__module__ not in ("builtins", "torch")
            ):
                self._given[name] = type(admitted.__name__, (admitted,), {})
            elif isinstance(admitted, type) and type(admitted) is type:
                self._given[name] = admitted  # built in: its attributes cannot be set
            else:
                self._given[name] = _forwarding(admitted)
        return self._given[name]

    def persistent_load(self, pid: Any, /) -> Any:
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], torch.dtype)):  # pyright: ignore
            raise BadInputError(f"{self._where}: the pickle refers to {pid!r}, which is no tensor storage")
        return StorageRef(str(pid[2]), pid[1], int(pid[4]))  # pyright: ignore


def _forwarding(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: function(*arguments)


def _inert(name: str) -> Callable[..., Inert]:
    class Named(Inert):
        def __new__(cls, *arguments: Any, **_: Any) -> Any:
            return Inert(name, arguments)

    return Named


def read_pickle(data: bytes, where: str) -> Any:
    """The object of a pickle; tensors in it are TensorRef.

    Raises NotSupportedError naming a class that is not admitted, BadInputError when the pickle is broken.
    """
    try:
        return _Reader(data, where).load()
    except BadInputError as error:
        if where in str(error):
            raise
        raise type(error)(f"{where}: {error}") from error
    except MemoryError as error:
        raise BadInputError(f"{where}: the pickle asks for more memory than there is") from error
    except Exception as error:
        raise BadInputError(f"{where}: the pickle cannot be read: {type(error).__name__}: {error}") from error
