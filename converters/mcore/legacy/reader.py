"""Megatron's legacy `torch` checkpoints, read without megatron: one torch.save file for each model-parallel rank.

Every rank's file holds its slices under the names of its own modules, with layers and experts counted from 0. Here they
are placed, compared with the config, and joined; headers and pickles are read, tensors when they are wanted. The
layers of a stage follow from what its file holds, so that every way of dealing layers in order is understood.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.fold import folded
from ckptbridge.converters.layout import Box
from ckptbridge.converters.mapping import Family, Move
from ckptbridge.converters.mcore.legacy.names import Spelled
from ckptbridge.converters.mcore.legacy.rank import LegacyRank
from ckptbridge.converters.mcore.legacy.ranks import Degrees, check_expert_size, open_ranks, rank_folder
from ckptbridge.converters.mcore.legacy.slices import boxes_of, merge, slice_shape, whole_shape
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.pickles import TensorRef
from ckptbridge.converters.tensors import Checkpoint, LazyTensor, Stored, rows
from ckptbridge.converters.turned import turned

Replica = tuple[str, Stored, Stored]
"""(parameter, the tensor that is used, another rank's that must be equal)"""
_NOT_COMMON = ("model", "optimizer", "rng_state")


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """One parameter's slice on one rank: the entry `key` of its model's chunk `chunk`.

    `part` says which of the parameter's slices it is: the TP rank, or for an expert the ETP rank.
    """

    rank: LegacyRank
    chunk: int
    key: str
    move: Move
    part: int
    ref: TensorRef

    @property
    def label(self) -> str:
        return self.rank.label(self.chunk, self.key)

    @property
    def is_turned(self) -> bool:
        """Whether the file holds it transposed, among the other experts of its rank."""
        return self.rank.spelled[self.chunk][self.key].is_every_expert

    def tensor(self) -> Stored:
        """The slice as it lies in the file. Raises NotSupportedError where it does not lie there as it is."""
        if self.is_turned:
            raise NotSupportedError(
                f"{self.rank.path}: {self.key} holds the experts of Megatron's former GroupedMLP in one tensor; its "
                "weights are read, an optimizer's state of it is not: carry the weights alone with --no-optimizer"
            )
        return self.rank.tensor(self.ref, self.key)

    def weight(self) -> LazyTensor:
        """The slice, turned if need be."""
        if not self.is_turned:
            return self.tensor()
        (width, height), storage = self.ref.shape, self.ref.storage
        block = TensorRef(storage, self.ref.storage_offset, (height, width), (width, 1))
        return turned(self.rank.tensor(block, self.key))

    def whole(self) -> Stored:
        """The file's tensor that holds the slice."""
        return self.rank.tensor(self.rank.chunks[self.chunk][self.key], self.key)


@dataclass(slots=True, kw_only=True, eq=False)
class Parameter:
    """A parameter as the ranks hold it: `slices[part]` are all that hold that slice, the first of which is used."""

    move: Move
    slices: list[list[Held]]
    boxes: list[list[Box]] = field(default_factory=list[list[Box]])
    """What each slice is of the whole parameter, padding of the vocabulary included."""
    shape: tuple[int, ...] = ()
    """The whole parameter's shape, padding included."""


@dataclass(slots=True, kw_only=True, eq=False)
class LegacyFolder:
    """An opened legacy checkpoint. `ranks` are sorted by pp, tp, ep; `starts[pp][chunk]` is a chunk's first layer."""

    path: Path
    degrees: Degrees
    ranks: list[LegacyRank]
    starts: list[list[int]]
    num_layers: int
    _used: dict[str, LazyTensor] = field(default_factory=dict[str, LazyTensor])

    @property
    def common(self) -> Mapping[str, Any]:
        """What was saved beside the tensors, as the first rank has it."""
        return {key: value for key, value in self.ranks[0].tree.items() if not str(key).startswith(_NOT_COMMON)}

    @property
    def args(self) -> Namespace | None:
        return self.ranks[0].args

    def states(self) -> tuple[str, ...]:
        """Which states of the optimizer are there."""
        from ckptbridge.converters.mcore.optimizer.legacy import legacy_states_there  # it imports this module

        return legacy_states_there(self)

    def parameters(self, family: Family, config: ModelConfig, state: str = "") -> dict[str, LazyTensor]:
        """One state of every parameter, unsplit: see MegatronFolder."""
        if state:
            from ckptbridge.converters.mcore.optimizer.legacy import legacy_states

            return legacy_states(self, family, config, state)
        held = self.held(family, config)
        tensors = {parameter.move.name: joined(parameter, Held.weight) for parameter in held}
        self._used = {one[0].label: one[0].whole() for parameter in held for one in parameter.slices}
        return tensors

    def sources(self) -> Checkpoint:
        """The weights that `parameters` used, as the files hold them, by rank and key; before it, all there are."""
        return self._used or {
            rank.label(number, key): rank.tensor(chunk[key], key)
            for rank in self.ranks
            for number, chunk in enumerate(rank.chunks)
            for key in rank.spelled[number]
        }

    def held(self, family: Family, config: ModelConfig) -> list[Parameter]:
        """Every parameter with the slices that make it up, in the family's order.

        Raises BadInputError that lists everything missing and unexpected and every shape that the config contradicts.
        """
        return _Census(self, family, config).parameters()

    def replicas(self, family: Family, config: ModelConfig) -> list[Replica]:
        """Tensors that several ranks hold: each copy beside the one that is used, equal in a sound checkpoint."""
        found = {
            (copies[0].label, other.label): (parameter.move.name, copies[0].whole(), other.whole())
            for parameter in self.held(family, config)
            for copies in parameter.slices
            for other in copies[1:]
        }
        return list(found.values())


def open_legacy(folder: Path) -> LegacyFolder:
    """Open one iteration's folder of mp_rank files: every rank's pickle is read, no tensor.

    Raises BadInputError naming the file when one is missing or truncated, when ranks are not of one run, or when
    their layers do not add up; NotSupportedError for what the format or this version cannot hold.
    """
    degrees, ranks = open_ranks(folder)
    starts, total = _starts(folder, degrees, ranks)
    return LegacyFolder(path=folder, degrees=degrees, ranks=ranks, starts=starts, num_layers=total)


def joined(parameter: Parameter, tensor_of: Callable[[Held], LazyTensor]) -> LazyTensor:
    """A parameter put together from one tensor for each slice, the vocabulary without its padding.

    `tensor_of` may give another tensor of the slice's shape: a moment of the optimizer.
    """
    whole = merge([tensor_of(copies[0]) for copies in parameter.slices], parameter.boxes)
    return rows(whole, 0, parameter.move.shape[0]) if parameter.move.layout.is_vocab else whole


def _starts(folder: Path, degrees: Degrees, ranks: Sequence[LegacyRank]) -> tuple[list[list[int]], int]:
    """The first layer of every chunk, and the number of layers: chunk after chunk, the stages in turn."""
    counts = [[0] * degrees.vpp for _ in range(degrees.pp)]
    firsts: dict[int, LegacyRank] = {}
    for rank in ranks:
        first = firsts.setdefault(rank.pp, rank)
        for chunk in range(degrees.vpp):
            layers = rank.layers(chunk)
            if layers != first.layers(chunk):
                raise BadInputError(
                    f"{rank.path}: holds {len(layers)} layers, but {first.path}, of the same pipeline stage, "
                    f"{len(first.layers(chunk))}"
                )
            if layers and max(layers) != len(layers) - 1:
                gap = next(layer for layer in count() if layer not in layers)
                raise BadInputError(f"{rank.path}: layer {gap} of its {max(layers) + 1} is missing")
            counts[rank.pp][chunk] = len(layers)
    starts = [[0] * degrees.vpp for _ in range(degrees.pp)]
    total = 0
    for chunk in range(degrees.vpp):
        for pp in range(degrees.pp):
            starts[pp][chunk] = total
            total += counts[pp][chunk]
    return starts, total


def _experts_of(meaning: Spelled, ref: TensorRef, experts: int) -> list[tuple[Spelled, TensorRef]]:
    """A key's tensor, or each expert's part of it, turned as the parameter is; [] for one that does not split so.

    The former GroupedMLP computes with weight1.view(experts, hidden_size, -1) and weight2.view(experts, -1,
    hidden_size), each expert's matrix input by output (megatron-core 0.16, transformer/moe/experts.py).
    """
    if not meaning.is_every_expert:
        return [(meaning, ref)]
    split = 1 if meaning.candidates[0].endswith("linear_fc1.weight") else 0
    if len(ref.shape) != 2 or not experts or ref.shape[split] % experts:
        return []
    height, width = (size // experts if axis == split else size for axis, size in enumerate(ref.shape))
    return [
        (
            replace(meaning, expert=expert),
            TensorRef(ref.storage, ref.storage_offset + expert * height * width, (width, height), (1, width)),
        )
        for expert in range(experts)
    ]


class _Census:
    """Counts what the files hold against what the config asks for."""

    def __init__(self, folder: LegacyFolder, family: Family, config: ModelConfig) -> None:
        self._folder, self._config = folder, config
        if folder.num_layers != config.num_layers:
            raise BadInputError(
                f"{folder.path}: its files hold {folder.num_layers} layers, the config has {config.num_layers}"
            )
        self._moves = {move.name: move for move in family.moves(config)}
        self._experts_here = (config.num_moe_experts or 0) // folder.degrees.ep
        self._etp = self._expert_size()
        self._missing: list[str] = []
        self._unexpected: list[str] = []
        self._wrong: list[str] = []

    def parameters(self) -> list[Parameter]:
        found: dict[str, list[list[Held]]] = {}
        for held in self._all_held():
            slices = found.setdefault(held.move.name, [[] for _ in range(self._size(held.move))])
            slices[held.part if held.move.layout.tp is not None else 0].append(held)
        made: list[Parameter] = []
        for name, move in self._moves.items():
            slices = found.get(name)
            if slices is None:
                self._missing.append(name)
            elif gaps := [part for part, copies in enumerate(slices) if not copies]:
                self._missing.append(f"{name} (not in {self._place(slices, gaps[0])})")
            else:
                made.append(self._checked(Parameter(move=move, slices=slices)))
        self._raise_if_any()
        return made

    def _place(self, slices: Sequence[Sequence[Held]], part: int) -> str:
        """The folder in which a slice is missing, as the other slices' own folders tell."""
        degrees, other = self._folder.degrees, next(copies[0] for copies in slices if copies).rank
        return rank_folder(degrees.pp > 1, degrees.ep > 1, part, other.pp, other.ep)

    def _size(self, move: Move) -> int:
        """In how many slices a parameter lies."""
        if move.layout.tp is None:
            return 1
        return self._folder.degrees.tp if move.expert is None else self._etp

    def _all_held(self) -> Iterator[Held]:
        for rank in self._folder.ranks:
            for number, chunk in enumerate(rank.chunks):
                for key, meaning in rank.spelled[number].items():
                    parts = _experts_of(meaning, chunk[key], self._experts_here)
                    moves = [self._move(rank, number, one) for one, _ in parts]
                    if None in moves or not parts:
                        self._unexpected.append(rank.label(number, key))
                        continue
                    for move, (_, ref) in zip(moves, parts, strict=True):
                        if move is not None:
                            part = rank.tp if move.expert is None else rank.tp % self._etp
                            yield Held(rank, number, key, move, part, ref)

    def _move(self, rank: LegacyRank, chunk: int, meaning: Spelled) -> Move | None:
        layer = None if meaning.layer is None else self._folder.starts[rank.pp][chunk] + meaning.layer
        expert = meaning.expert
        if expert is not None:
            if expert >= self._experts_here:
                return None
            expert += rank.ep * self._experts_here
        for candidate in meaning.candidates:
            name = candidate.replace("{layer}", str(layer)).replace("{expert}", str(expert))
            if move := self._moves.get(name):
                return move
        return None

    def _expert_size(self) -> int:
        """The ETP size, from the arguments or from the width of an expert's slice."""
        degrees = self._folder.degrees
        if degrees.etp is not None or self._config.num_moe_experts is None:
            return degrees.etp or degrees.tp
        width = next(
            (
                ref.shape[-1]
                for rank in self._folder.ranks
                for number, keys in enumerate(rank.spelled)
                for key, meaning in keys.items()
                for one, ref in _experts_of(meaning, rank.chunks[number][key], self._experts_here)[:1]
                if one.expert is not None and one.candidates[0].endswith("linear_fc2.weight")
            ),
            0,
        )
        whole = self._config.moe_ffn_hidden_size or 0
        etp = whole // width if width and whole % width == 0 else degrees.tp
        check_expert_size(self._folder.path, degrees, etp)
        return etp

    def _checked(self, parameter: Parameter) -> Parameter:
        """The parameter with its boxes; what does not fit the config is noted."""
        move, config = parameter.move, self._config
        used = [copies[0] for copies in parameter.slices]
        try:
            parameter.shape = whole_shape(move.layout, move.shape, [h.ref.shape for h in used], self._most_padding())
            parameter.boxes = boxes_of(move.layout, parameter.shape, config, len(used))
        except BadInputError as error:
            self._wrong.append(f"  {used[0].label}: {error}")
            return parameter
        dtype = used[0].ref.storage.dtype
        for held, boxes in ((h, b) for c, b in zip(parameter.slices, parameter.boxes, strict=True) for h in c):
            expected = slice_shape(boxes, parameter.shape)
            if held.ref.shape != expected:
                told = f"expected shape {list(expected)} from the config, found {list(held.ref.shape)}"
                self._wrong.append(f"  {held.label}: {told}")
            elif held.ref.storage.dtype != dtype:
                told = f"is {held.ref.storage.dtype}, but {dtype} in {used[0].label}"
                self._wrong.append(f"  {held.label}: {told}")
        return parameter

    def _most_padding(self) -> int:
        """Megatron pads the vocabulary to a multiple of this; without args, of the largest that is in use."""
        multiple = getattr(self._folder.args, "make_vocab_size_divisible_by", None)
        return multiple * self._folder.degrees.tp if type(multiple) is int else 128 * 64

    def _raise_if_any(self) -> None:
        if not (self._missing or self._unexpected or self._wrong):
            return
        lines = [f"{self._folder.path}: the tensors do not fit the config, so nothing was written"]
        for told, names in (("missing", self._missing), ("unexpected", self._unexpected)):
            lines += [f"  {len(names)} {told}: {', '.join(folded(names)[:12])}"] if names else []
        more = [f"  ... and {len(self._wrong) - 12} more"] if len(self._wrong) > 12 else []
        raise BadInputError("\n".join([*lines, *self._wrong[:12], *more]))
