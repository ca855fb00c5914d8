"""A pickle reader that runs nothing: only the classes that checkpoint files need are admitted, by name.

`torch.load(weights_only=True)` admits what torch chose; Megatron's files also hold an argparse.Namespace, DCP's
metadata classes and enums of megatron itself. Enums and recipes of megatron become inert values, so that a
checkpoint is read without megatron being there. Anything else is refused with its name.
"""

from __future__ import annotations

import _compat_pickle
import argparse
import collections
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ckptbridge.converters.errors import BadInputError, NotSupportedError, told
from ckptbridge.converters.mcore import distributed_metadata
from ckptbridge.converters.pickle_machine import PickleMachine


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

    def __repr__(self) -> str:
        return self.name


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

_DTYPES = {name: dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}
_LONGEST_RANGE = 1 << 16
_LONGEST_TOLD = 300
"""Characters of a name or a reason that an error repeats."""

_INERT_PREFIXES = ("megatron.", "transformer_engine.")
_INERT_NAMES = frozenset(
    (
        *("signal.Signals", "enum.Enum", "torch.nn.functional.silu", "torch.nn.functional.gelu"),
        *("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter"),
        # Random states, and Transformer Engine's fp8 scales.
        *("numpy.ndarray", "numpy.dtype", "_io.BytesIO"),
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
        # Megatron keeps the plan of the save that wrote the folder.
        *(
            f"torch.distributed.checkpoint.planner.{name}"
            for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")
        ),
    )
)


def _rebuild_tensor(storage: Any, offset: int, shape: Any, stride: Any, *_: Any) -> TensorRef:
    if not isinstance(storage, StorageRef):
        raise BadInputError(f"a tensor is built from {type(storage).__name__}, which is no storage")
    numbers = (offset, *shape, *stride)
    if len(numbers) > 129 or not all(type(n) is int and abs(n) < 1 << 62 for n in numbers):
        raise BadInputError(f"a tensor has shape {told(shape)} and strides {told(stride)}")
    return TensorRef(storage, offset, tuple(shape), tuple(stride))


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _rebuild_with_attributes(_rebuild: Any, _kind: Any, arguments: Any, *_: Any) -> TensorRef:
    """A tensor to which Megatron has given attributes, such as how a main weight is cut; they are left out."""
    return _rebuild_tensor(*arguments)


def _encode(text: str, encoding: str = "utf-8") -> bytes:
    return text.encode(encoding)


def _bytearray(*content: Any) -> bytearray:
    if any(isinstance(part, int) for part in content):
        raise BadInputError("the pickle asks for a bytearray of a size without its bytes")
    return bytearray(*content)


def _no_bytes() -> bytes:
    """How protocol 2 writes b""."""
    return b""


def _slice(*ends: Any) -> slice:
    if not all(end is None or type(end) is int for end in ends):
        raise BadInputError("the pickle asks for a slice of something else than numbers")
    return slice(*ends)


def _range(*ends: int) -> range:
    made = range(*ends)
    if made and max(abs(made[0]), abs(made[-1])) > _LONGEST_RANGE:
        raise BadInputError("the pickle asks for a range that no checkpoint has")
    return made


_ADMITTED: dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace,
    "collections.OrderedDict": collections.OrderedDict,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.complex": complex,
    "builtins.bytearray": _bytearray,
    "builtins.bytes": _no_bytes,
    "builtins.slice": _slice,
    "builtins.range": _range,
    "_codecs.encode": _encode,
    "pathlib.PosixPath": pathlib.PurePosixPath,
    "pathlib.PurePosixPath": pathlib.PurePosixPath,
    "pathlib.Path": pathlib.PurePosixPath,
    "pathlib._local.PosixPath": pathlib.PurePosixPath,
    "torch.Size": torch.Size,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_with_attributes,
    "torch.serialization._get_layout": torch.serialization._get_layout,  # pyright: ignore
    **distributed_metadata.NAMES,
}


_PYTHON_2_MODULES = _compat_pickle.IMPORT_MAPPING
_PYTHON_2_NAMES = _compat_pickle.NAME_MAPPING
"""Protocol 2, which torch writes, has Python 2's names."""


class _Reader(PickleMachine):
    def __init__(self, data: bytes, where: str) -> None:
        super().__init__(data)
        self._where = where
        self._given: dict[str, Any] = {}

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        old = (module_name, global_name)
        name = ".".join(_PYTHON_2_NAMES.get(old, (_PYTHON_2_MODULES.get(module_name, module_name), global_name)))
        if name in _ADMITTED:
            return self._throwaway(name)
        if module_name in ("torch", "torch.storage") and global_name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[global_name]
        if module_name == "torch" and global_name in _DTYPES:
            return _DTYPES[global_name]
        if module_name.startswith(_INERT_PREFIXES) or name in _INERT_NAMES:
            return _inert(name)
        raise NotSupportedError(
            f"{self._where}: the pickle asks for {name[:_LONGEST_TOLD]}, which no checkpoint needs; it was not loaded. "
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
                self._given[name] = type(admitted.__name__, (admitted,), {"__repr__": object.__repr__})
            elif isinstance(admitted, type) and type(admitted) is type:
                self._given[name] = admitted  # built in: its attributes cannot be set
            else:
                self._given[name] = _forwarding(admitted)
        return self._given[name]

    def persistent_load(self, pid: Any, /) -> Any:
        match pid:
            case ("storage", torch.dtype() as dtype, str() as key, _, int() as numel, *_):
                return StorageRef(key, dtype, numel)
            case _:
                raise BadInputError(f"{self._where}: the pickle refers to what is no tensor storage")


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
    except Exception as error:
        told = f"{type(error).__name__}: {error}"[:_LONGEST_TOLD]
        raise BadInputError(f"{where}: the pickle cannot be read: {told}") from error
