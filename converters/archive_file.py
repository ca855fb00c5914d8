"""A whole torch.save file planned before a tensor is read: any tree of Python values with lazy tensors in it.

`data.pkl` comes first, as torch puts it; the tensors follow in the order in which the tree names them, each behind a
local header, and the directory with every CRC-32 closes the file. Sizes and offsets beyond 4 GiB are 64-bit ones.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, cast
from zlib import crc32

import torch

from ckptbridge.converters.errors import NotSupportedError
from ckptbridge.converters.inert_pickles import InertPickler
from ckptbridge.converters.output import OutputFile, Patch, Piece
from ckptbridge.converters.pickles import Inert
from ckptbridge.converters.tensors import InMemory, LazyTensor
from ckptbridge.converters.torch_archive import (
    SAVED_DTYPES,
    STORAGE_CLASSES,
    directory_end,
    directory_entry,
    local_header,
)


@dataclass(frozen=True, slots=True, eq=False)
class Leaf:
    """A tensor's place in a tree. `name` is that of its piece: unique in the whole output."""

    name: str
    tensor: LazyTensor


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: torch.dtype
    numel: int


class _HoldsInert(Exception):
    """A tree holds a value of a class that is not imported: pickle's own C code cannot write its name."""


class _Tree:
    """Pickles leaves as torch pickles tensors, and remembers them in order: leaf i is the entry data/i.

    A tensor that is there already, such as an optimizer's step, becomes a leaf named after the file.
    """

    file: str
    leaves: list[Leaf]

    def reducer_override(self, obj: Any, /) -> Any:
        if isinstance(obj, torch.Tensor):
            obj = Leaf(f"{self.file}#{len(self.leaves)}", InMemory(obj))
        if not isinstance(obj, Leaf):
            return self.other(obj)
        shape, dtype = obj.tensor.shape, obj.tensor.dtype
        if dtype not in SAVED_DTYPES:
            raise NotSupportedError(f"{obj.name}: torch.save's files cannot hold {dtype}; convert with --dtype bf16")
        storage = _Storage(str(len(self.leaves)), dtype, prod(shape))
        self.leaves.append(obj)
        stride = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
        no_hooks = cast(Any, OrderedDict())
        return torch._utils._rebuild_tensor_v2, (storage, 0, shape, stride, False, no_hooks)  # pyright: ignore

    def other(self, obj: Any) -> Any:
        return InertPickler.reducer_override(cast(Any, self), obj)

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Storage):
            return ("storage", STORAGE_CLASSES[obj.dtype], obj.key, "cpu", obj.numel)
        return None


class _InertTreePickler(_Tree, InertPickler):
    """Writes everything, in Python."""


class _TreePickler(_Tree, pickle.Pickler):
    """In C: six times as fast, which a model of 60,000 slices needs."""

    def other(self, obj: Any) -> Any:
        if isinstance(obj, Inert):
            raise _HoldsInert
        return super().other(obj)


def _pickled(tree: Any, file: str, kind: type[_Tree] = _TreePickler) -> tuple[bytes, list[Leaf]]:
    out = io.BytesIO()
    pickler: Any = kind(out, protocol=2)  # pyright: ignore[reportCallIssue]
    leaves: list[Leaf] = []
    pickler.file, pickler.leaves = file, leaves
    try:
        pickler.dump(tree)
    except _HoldsInert:
        return _pickled(tree, file, _InertTreePickler)
    return out.getvalue(), leaves


@dataclass(frozen=True, slots=True)
class _Entry:
    """A file of the archive: `data` if its bytes are known already, else those of the piece `piece`."""

    name: str
    at: int
    nbytes: int
    data: bytes = b""
    piece: str | None = None

    def crc(self, crcs: Mapping[str, int]) -> int:
        return crc32(self.data) if self.piece is None else crcs[self.piece]


def archive_file(name: str, tree: Any) -> OutputFile:
    """The file `name` as torch.save would write `tree`, whose tensors are `Leaf`s.

    Raises NotSupportedError naming a tensor whose dtype torch.save's files cannot hold.
    """
    body, leaves = _pickled(tree, name)
    file = OutputFile(name)
    entries: list[_Entry] = []
    _add_known(file, entries, "archive/data.pkl", body)
    _add_known(file, entries, "archive/byteorder", b"little")
    for number, leaf in enumerate(leaves):
        at, nbytes, entry = file.size, leaf.tensor.nbytes, f"archive/data/{number}"
        data_at = at + len(local_header(entry, nbytes, 0, at))
        file.pieces.append(Piece(leaf.name, data_at, leaf.tensor, partial(_piece_header, entry, nbytes, at)))
        entries.append(_Entry(entry, at, nbytes, piece=leaf.name))
        file.size = data_at + nbytes
    _add_known(file, entries, "archive/version", b"3\n")
    directory_at = file.size
    file.closing = partial(_directory, entries, directory_at)
    file.size += len(_directory(entries, directory_at, dict.fromkeys((p.name for p in file.pieces), 0))[0][1])
    return file


def _add_known(file: OutputFile, entries: list[_Entry], name: str, data: bytes) -> None:
    header = local_header(name, len(data), crc32(data))
    entries.append(_Entry(name, file.size, len(data), data))
    file.patches.append((file.size, header + data))
    file.size += len(header) + len(data)


def _piece_header(entry: str, nbytes: int, at: int, crc: int) -> Sequence[Patch]:
    return [(at, local_header(entry, nbytes, crc, at))]


def _directory(entries: Sequence[_Entry], at: int, crcs: Mapping[str, int]) -> Sequence[Patch]:
    made = b"".join(directory_entry(e.name, e.at, e.nbytes, e.crc(crcs)) for e in entries)
    return [(at, made + directory_end(at, len(made), len(entries)))]
