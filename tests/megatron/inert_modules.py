"""Modules that are not there: importing them succeeds, and whatever is taken from them does nothing.

Megatron-Bridge imports Transformer Engine, ModelOpt and more wherever it runs; what is tested of it calls none.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _InertType(type):
    def __getattr__(cls, name: str) -> Any:
        return _made(cls, name)


class _InertModule(ModuleType):
    __path__: Sequence[str] = ()
    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        return _made(self, name)


def _made(owner: Any, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    made = _InertType(name, (), {"__init__": lambda self, *args, **kwargs: None})
    setattr(owner, name, made)
    return made


class _Finder(MetaPathFinder, Loader):
    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if any(fullname == name or fullname.startswith(f"{name}.") for name in self._names):
            return ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _InertModule(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


def stand_in_for(*names: str) -> None:
    """From now on these packages can be imported in this process, and are empty."""
    sys.meta_path.insert(0, _Finder(names))
