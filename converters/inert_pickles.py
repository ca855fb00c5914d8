"""Values of classes that are not imported, written as they were read: an enum of Megatron's stays that enum."""

from __future__ import annotations

import io
import pickle
from argparse import Namespace
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import PurePosixPath
from types import ModuleType
from typing import Any, cast

import torch

from ckptbridge.converters.pickles import Inert, TensorRef

# pickle's C implementation insists on importing what it names; the one in Python lets a name be written as it is.
_PythonPickler = cast(Any, pickle._Pickler)  # pyright: ignore


_READER = Inert.__module__
"""The reader of pickles gives out classes of its own for those that it admits: namespaces, dictionaries, paths."""


@dataclass(frozen=True, slots=True)
class _Named:
    """Stands for a class or function while it is pickled by its name alone."""

    name: str

    def __call__(self) -> None:
        """Nothing: pickle asks that what it names can be called."""


class InertPickler(_PythonPickler):
    """Pickles an Inert value as a call of what its name says."""

    def reducer_override(self, obj: Any, /) -> Any:
        if isinstance(obj, Inert):
            return _Named(obj.name), obj.arguments
        if type(obj).__module__ != _READER:
            return NotImplemented
        if isinstance(obj, Namespace):
            return Namespace, (), vars(obj)
        if isinstance(obj, OrderedDict):
            return OrderedDict, (), None, None, iter(cast(Any, obj).items())
        return PurePosixPath, cast(PurePosixPath, obj).parts

    def _save_named(self, named: _Named) -> None:
        module, _, name = named.name.rpartition(".")
        self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())

    dispatch = {**_PythonPickler.dispatch, _Named: _save_named}  # noqa: RUF012 - pickle's own class attribute


def is_faithful(value: Any) -> bool:
    """Whether a value read from a pickle still is all that was saved.

    An object of an unknown class was read without its attributes, and a large tensor was not read.
    """
    waiting, seen = [value], set[int]()
    while waiting:
        found = waiting.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, TensorRef) or (isinstance(found, Inert) and not found.arguments):
            return False
        if isinstance(found, type) and issubclass(found, Inert):
            return False
        if isinstance(found, Namespace):
            waiting.append(vars(found))
        elif isinstance(found, dict):
            entries = cast(dict[Any, Any], found)
            waiting += [*entries.keys(), *entries.values()]
        elif isinstance(found, list | tuple | set | frozenset):
            waiting += cast(list[Any], found)
        elif isinstance(found, Inert):
            waiting += found.arguments
    return True


def saved(value: Any) -> bytes:
    """The bytes of torch.save for a value that may hold Inert ones."""
    out = io.BytesIO()
    module = cast(Any, ModuleType("inert_pickle"))
    module.Pickler = InertPickler
    torch.save(value, out, pickle_module=module)
    return out.getvalue()
