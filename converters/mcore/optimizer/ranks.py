"""One rank's part of a legacy checkpoint's optimizer: its parameters in order, and what was found for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.mcore.legacy.rank import LegacyRank
from ckptbridge.converters.mcore.legacy.reader import Held, Parameter
from ckptbridge.converters.mcore.optimizer.settings import optimizer_parts
from ckptbridge.converters.tensors import LazyTensor

BUFFERS = "distrib_optim.pt"
"""The file beside model_optim_rng.pt that holds a distributed optimizer's flat buffers."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The parameters of one model chunk of a rank, in the order of its modules."""

    number: int
    held: tuple[Held, ...]

    def of_part(self, part: int, count: int) -> list[Held]:
        """Those of one chained optimizer: the second one is the experts'."""
        return [held for held in self.held if count == 1 or (held.move.expert is not None) == (part == 1)]


@dataclass(slots=True, kw_only=True)
class RankFound:
    """`tensors` are a slice's states by the slice's id; `sources` all optimizer tensors in the rank's files."""

    tensors: dict[int, dict[str, LazyTensor]] = field(default_factory=dict[int, dict[str, LazyTensor]])
    sources: dict[str, LazyTensor] = field(default_factory=dict[str, LazyTensor])


def chunks_by_rank(
    ranks: Iterable[LegacyRank], parameters: Iterable[Parameter]
) -> list[tuple[LegacyRank, list[Chunk]]]:
    """Every rank's parameters, chunk by chunk, in the order of its file, which is that of its modules."""
    held: dict[tuple[int, int, str], Held] = {}
    for parameter in parameters:
        for copies in parameter.slices:
            held |= {(id(one.rank), one.chunk, one.key): one for one in copies}
    found: list[tuple[LegacyRank, list[Chunk]]] = []
    for rank in ranks:
        keys = [[(id(rank), number, key) for key in chunk] for number, chunk in enumerate(rank.chunks)]
        found.append((rank, [Chunk(n, tuple(held[k] for k in chunk if k in held)) for n, chunk in enumerate(keys)]))
    return found


def parts_of_rank(rank: LegacyRank) -> list[dict[str, Any]]:
    """The state dict of each chained optimizer in a rank's file. Raises BadInputError when there is none."""
    saved = rank.tree.get("optimizer")
    if not saved:
        raise BadInputError(f"{rank.path}: holds no optimizer, other ranks do")
    return optimizer_parts(saved, str(rank.path))


def moment_name(rank: str, state: str, chunk: int, key: str) -> str:
    """The unique name of one tensor of a plain optimizer: mp_rank_00:optimizer.exp_avg.0.decoder.layers..."""
    return f"{rank}:optimizer.{state}.{chunk}.{key}"


def buffer_name(rank: str, part: int, buffer: int, state: str) -> str:
    """The name of one flat buffer: mp_rank_00:distrib_optim.pt.0.0.exp_avg."""
    return f"{rank}:{BUFFERS}.{part}.{buffer}.{state}"
