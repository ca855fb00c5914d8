"""One rank's file of a legacy checkpoint, opened: what its pickle says, where its tensors lie. No tensor is read."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, cast

from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.mcore.legacy.names import Spelled, spelled
from ckptbridge.converters.pickles import TensorRef
from ckptbridge.converters.tensors import Stored
from ckptbridge.converters.torch_archive import read_archive, stored_tensor

FILE = "model_optim_rng.pt"
_MODEL = re.compile(r"model(\d*)")
_MOST_NESTED, _MOST_ENTRIES = 16, 1 << 20


@dataclass(slots=True, kw_only=True, eq=False)
class LegacyRank:
    """One rank's file. `chunks[i]` are the tensors of its model's chunk i by their keys, in the file's order."""

    path: Path
    tree: dict[str, Any]
    """The whole of the pickle: tensors in it are TensorRef, what needs a class of Megatron's is Inert."""
    storages: dict[str, tuple[int, int]]
    chunks: list[dict[str, TensorRef]]
    tp: int = 0
    pp: int = 0
    ep: int = 0
    spelled: list[dict[str, Spelled]] = field(default_factory=list[dict[str, Spelled]])
    """What the keys mean, without those that carry no weights."""

    @property
    def name(self) -> str:
        """The folder's name: mp_rank_00_001."""
        return self.path.parent.name

    @property
    def args(self) -> Namespace | None:
        args = self.tree.get("args")
        return args if isinstance(args, Namespace) else None

    def label(self, chunk: int, key: str) -> str:
        """A name for one tensor of the model that is unique in the checkpoint: mp_rank_00_001:decoder.layers.0..."""
        return rank_label(self.name, chunk if len(self.chunks) > 1 else None, key)

    def tensor(self, ref: TensorRef, what: str) -> Stored:
        """A tensor of the tree. Raises BadInputError naming file and tensor when it is no contiguous range of bytes."""
        return stored_tensor(ref, self.path, self.storages, f"{self.path}: tensor {what}")

    def layers(self, chunk: int) -> set[int]:
        """The local numbers of the layers that a chunk holds."""
        return {key.layer for key in self.spelled[chunk].values() if key.layer is not None}


def rank_label(rank: str, chunk: int | None, key: str) -> str:
    """A unique name for a tensor of one rank's model; `chunk` is None where the model is not in chunks."""
    return f"{rank}:{key}" if chunk is None else f"{rank}:model{chunk}.{key}"


def open_rank(path: Path) -> LegacyRank:
    """Open one rank's file.

    Raises BadInputError when it is truncated, holds no model or a weight that is no contiguous range of bytes,
    NotSupportedError for a pickle that asks for what no checkpoint needs.
    """
    tree, storages = read_archive(path)
    if not isinstance(tree, dict):
        raise BadInputError(f"{path}: expected a dictionary with a model, found {type(tree).__name__}")
    known = cast(dict[str, Any], tree)
    rank = LegacyRank(path=path, tree=known, storages=storages, chunks=_chunks(path, known))
    for chunk in rank.chunks:
        understood = {key: spelled(key) for key in chunk}
        rank.spelled.append({key: meaning for key, meaning in understood.items() if meaning is not None})
        for key in rank.spelled[-1]:
            rank.tensor(chunk[key], key)
    _check_version(rank)
    return rank


def _check_version(rank: LegacyRank) -> None:
    """Before version 2 the rows of query_key_value stood in another order; Megatron takes a missing one for 0."""
    version: Any = rank.tree.get("checkpoint_version", 0)
    if any(".query_key_value." in key for chunk in rank.chunks for key in chunk) and not (
        isinstance(version, int | float) and version >= 2
    ):
        raise NotSupportedError(
            f"{rank.path}: checkpoint_version {version!r}, in which query_key_value has its rows in another order; 2.0 "
            "and later are supported. Load it with the Megatron-LM of its time and save it again"
        )


def _chunks(path: Path, tree: Mapping[Any, Any]) -> list[dict[str, TensorRef]]:
    numbers: dict[int, Any] = {}
    for key, value in tree.items():
        if isinstance(key, str) and (hit := _MODEL.fullmatch(key)):
            numbers[int(hit[1][:6]) if hit[1] else -1] = value
    if not numbers:
        raise BadInputError(f"{path}: holds no model; its keys are {', '.join(map(str, list(tree)[:12]))}")
    if sorted(numbers) not in ([-1], list(range(len(numbers)))):
        raise BadInputError(f"{path}: its models are numbered {sorted(numbers)}; expected one, or model0, model1, ...")
    chunks: list[dict[str, TensorRef]] = []
    for _, model in sorted(numbers.items()):
        found: dict[str, TensorRef] = {}
        for name, value in _flat(path, model, "", 0, count()):
            if name in found:
                raise BadInputError(f"{path}: two tensors are called {name}")
            found[name] = value
        chunks.append(found)
    return chunks


def _flat(path: Path, value: Any, prefix: str, depth: int, seen: Iterator[int]) -> Iterator[tuple[str, TensorRef]]:
    """Nested dictionaries as one with dotted keys; what is no tensor, such as extra state, is left out."""
    if next(seen) > _MOST_ENTRIES:  # one dictionary under many names, again and again
        raise BadInputError(f"{path}: the model has more than {_MOST_ENTRIES} entries")
    if isinstance(value, TensorRef):
        yield prefix, value
    elif isinstance(value, dict):
        if depth > _MOST_NESTED:
            raise BadInputError(f"{path}: the model's dictionaries are nested more than {_MOST_NESTED} deep")
        for key, inner in cast(dict[Any, Any], value).items():
            if not isinstance(key, str):
                raise BadInputError(f"{path}: the model has a key {key!r}, expected a name")
            yield from _flat(path, inner, f"{prefix}.{key}" if prefix else key, depth + 1, seen)
    elif not prefix:
        raise BadInputError(f"{path}: its model is {type(value).__name__}, expected a dictionary")
