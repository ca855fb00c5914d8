"""In which order a model's shards are used, and how many of them are on the disk at a time.

The work is ordered by shard, not by output file: a shard is fetched, everything that is made of it is written to
whatever files it goes to, and it is dropped. So the bound does not depend on the layout: at every TP, PP and EP it is
the shard in hand, those that are fetched ahead, and those that share a parameter with one that is still to come (the
q, k and v of a layer that a shard's end divides).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ckptbridge.converters.errors import NotSupportedError
from ckptbridge.converters.output import OutputFile
from ckptbridge.converters.tasks import Task, leaves, tasks_of
from ckptbridge.converters.tensors import LazyTensor


@dataclass(slots=True)
class Step:
    """What can be written once `shard` is there, beside shards of earlier steps. One of "" needs none."""

    shard: str
    files: Sequence[OutputFile]
    tasks: list[Task] = field(default_factory=list[Task])
    needs: set[str] = field(default_factory=set[str])
    """All shards that its tasks are made of."""
    drops: list[str] = field(default_factory=list[str])
    """Shards that no later step needs."""

    def pieces(self) -> Iterator[tuple[str, str]]:
        """(file, piece) of everything that it writes."""
        for task in self.tasks:
            for outlet in task:
                yield from ((self.files[number].name, piece.name) for number, piece in outlet.places)


def steps_of(files: Sequence[OutputFile], done: Mapping[str, Collection[str]]) -> list[Step]:
    """All that is left to do for these files, in the order of the shards' names. `done` are pieces by file."""
    by_shards: dict[frozenset[str], list[Task]] = {}
    for task in tasks_of(files):
        if not all(p.name in done.get(files[number].name, ()) for outlet in task for number, p in outlet.places):
            shards = frozenset(shard for outlet in task for shard in _shards_of(outlet.tensor))
            by_shards.setdefault(shards, []).append(task)
    return _in_order(by_shards, files)


def steps_for(tensors: Iterable[LazyTensor]) -> list[Step]:
    """The steps of any conversion of these parameters, without what is written in them."""
    return _in_order({_shards_of(tensor): [] for tensor in tensors}, ())


def _in_order(by_shards: Mapping[frozenset[str], list[Task]], files: Sequence[OutputFile]) -> list[Step]:
    last: dict[str, str] = {}
    steps: dict[str, Step] = {}
    for shards in sorted(by_shards, key=lambda shards: max(shards, default="")):
        shard = max(shards, default="")
        step = steps.setdefault(shard, Step(shard, files))
        step.tasks += by_shards[shards]
        step.needs |= shards
        last |= dict.fromkeys(shards, shard)
    for name, shard in last.items():
        steps[shard].drops.append(name)
    return list(steps.values())


def held_at_most(steps: Sequence[Step], nbytes: Mapping[str, int], ahead: int) -> tuple[int, int]:
    """(how many shards, how many bytes of them) are on the disk at a time when `ahead` more are fetched beside one."""
    held: set[str] = set()
    most, most_nbytes = 0, 0
    for number, step in enumerate(steps):
        held |= step.needs | {later.shard for later in steps[number + 1 : number + 1 + ahead]}
        most, most_nbytes = max(most, len(held)), max(most_nbytes, sum(nbytes[name] for name in held))
        held -= set(step.drops)
    return most, most_nbytes


def _shards_of(tensor: LazyTensor) -> frozenset[str]:
    found: set[str] = set()
    for leaf in leaves(tensor):
        path: Path | None = getattr(leaf, "path", None)
        if path is None:
            raise NotSupportedError(
                f"a {type(leaf).__name__} does not say which file it is read from, so the model cannot be converted "
                "while it is fetched; download it first with `hf download`"
            )
        found.add(path.name)
    return frozenset(found)
