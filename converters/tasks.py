"""What is written together: pieces that come from the same bytes of the source, and files that share such pieces.

A matrix whose columns are cut for eight ranks lies in eight files, and reading it once for each costs eight times
the reading. So a task is all pieces of one or more files that are made of the same stored tensors, and a bundle is
files that have much of their bytes in common tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ckptbridge.converters.output import OutputFile, Piece
from ckptbridge.converters.tensors import LazyTensor, Reshaped, Rows, Zeros

MOST_FILES = 16
"""In one bundle: they are open at the same time, and a run that is stopped begins them anew."""
_WORTH_SHARING = 0.25
"""Files are written together when at least this share of one's bytes is made of what the others read as well."""


@dataclass(slots=True)
class Outlet:
    """A tensor and all the places that it goes to: (number of the file, piece)."""

    tensor: LazyTensor
    places: list[tuple[int, Piece]] = field(default_factory=list[tuple[int, Piece]])


Task = list[Outlet]


def leaves(tensor: LazyTensor) -> Iterable[LazyTensor]:
    """The stored tensors that a tensor is made of; zeros are none."""
    bases = tensor.bases()
    if not bases:
        return () if isinstance(tensor, Zeros) else (tensor,)
    if len(bases) == 1:
        return leaves(bases[0])
    return {id(leaf): leaf for base in bases for leaf in leaves(base)}.values()


def tasks_of(files: Sequence[OutputFile]) -> list[Task]:
    """Every piece of these files, once, in tasks that share no stored tensor; in the files' order."""
    by_tensor: dict[object, Outlet] = {}
    for number, file in enumerate(files):
        for piece in file.pieces:
            tensor = piece.tensor
            while isinstance(tensor, Reshaped):  # the bytes are the same, in smaller rows
                tensor = tensor.tensor
            by_tensor.setdefault(_identity(tensor), Outlet(tensor)).places.append((number, piece))
    outlets = list(by_tensor.values())
    first_of_leaf: dict[int, int] = {}
    joined = list(range(len(outlets)))
    """Each outlet's task, by the number of an earlier outlet that is in it, or its own."""

    def task(number: int) -> int:
        while joined[number] != number:
            joined[number] = joined[joined[number]]
            number = joined[number]
        return number

    for number, outlet in enumerate(outlets):
        for leaf in leaves(outlet.tensor):
            a, b = task(first_of_leaf.setdefault(id(leaf), number)), task(number)
            joined[max(a, b)] = min(a, b)
    tasks: dict[int, Task] = {}
    for number, outlet in enumerate(outlets):
        tasks.setdefault(task(number), []).append(outlet)
    return list(tasks.values())


def _identity(tensor: LazyTensor) -> object:
    """The same for tensors that are known to hold the same: copies of an expert are cut from one matrix anew."""
    return (
        tuple((id(base), start, stop) for base, start, stop in tensor.pieces)
        if isinstance(tensor, Rows)
        else id(tensor)
    )


def bundles_of(files: Sequence[OutputFile], most: int = MOST_FILES) -> list[list[OutputFile]]:
    """The files, in bundles that are written together; in order of their first files."""
    used = [_nbytes_of_leaves(file) for file in files]
    spread: dict[int, int] = {}
    for leaf in (leaf for nbytes in used for leaf in nbytes):
        spread[leaf] = spread.get(leaf, 0) + 1
    bundles: list[list[OutputFile]] = []
    held: list[set[int]] = []
    holders: dict[int, list[int]] = {}
    """Which bundles hold a leaf."""
    for file, nbytes in zip(files, used, strict=True):
        shared: dict[int, int] = {}
        for leaf, count in nbytes.items():
            for bundle in holders.get(leaf, ()):
                shared[bundle] = shared.get(bundle, 0) + count
        best = max(shared, key=lambda bundle: shared[bundle], default=-1)
        if (
            best < 0
            or shared[best] < _WORTH_SHARING * file.tensor_nbytes
            or len(bundles[best]) >= min(most, max(spread[leaf] for leaf in nbytes if leaf in held[best]))
        ):
            best = len(bundles)
            bundles.append([])
            held.append(set())
        bundles[best].append(file)
        for leaf in nbytes.keys() - held[best]:
            holders.setdefault(leaf, []).append(best)
        held[best] |= nbytes.keys()
    return bundles


def _nbytes_of_leaves(file: OutputFile) -> dict[int, int]:
    """How many of a file's bytes each stored tensor takes part in."""
    nbytes: dict[int, int] = {}
    for piece in file.pieces:
        for leaf in leaves(piece.tensor):
            nbytes[id(leaf)] = nbytes.get(id(leaf), 0) + piece.tensor.nbytes
    return nbytes
