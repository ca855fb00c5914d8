"""The optimizer for legacy files: the item in each rank's file, and the flat buffers of the distributed one.

Order and groups are those that the run which loads the files makes for itself: by the modules' order, with one group
for what is decayed and one for norms and biases.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ckptbridge.converters.archive_file import Leaf, archive_file
from ckptbridge.converters.errors import NotSupportedError
from ckptbridge.converters.mapping import Move
from ckptbridge.converters.mcore.legacy.names import EMBEDDING, HEAD, Slot
from ckptbridge.converters.mcore.legacy.writer import FileRank, LegacyWriter
from ckptbridge.converters.mcore.optimizer.buffers import Flat, bucket_size, buffer_layout
from ckptbridge.converters.mcore.optimizer.ranks import BUFFERS, buffer_name, moment_name
from ckptbridge.converters.mcore.optimizer.settings import (
    Group,
    OptimizerKind,
    OptimizerSettings,
    chained,
    distributed_part,
    is_decoupled,
    is_undecayed,
    plain_part,
    wd_mult,
)
from ckptbridge.converters.mcore.optimizer.untrained import has_optimizer_state
from ckptbridge.converters.output import OutputFile
from ckptbridge.converters.tensors import Extent, LazyTensor

_STATES = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class _Place:
    """A parameter on a rank."""

    chunk: int
    key: str
    move: Move


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerBeside:
    """A LegacyWriter's `beside`: what a rank's optimizer holds of the states that the writer has been given."""

    kind: OptimizerKind
    settings: OptimizerSettings
    args: Namespace
    """Those of the run that will load the files: they decide about buckets and groups."""
    data_parallel_size: int
    moves: Mapping[str, Move]
    """Every parameter by name."""

    def __call__(
        self, writer: LegacyWriter, rank: FileRank, slots: list[list[Slot]]
    ) -> tuple[dict[str, Any], list[OutputFile]]:
        """`optimizer` in the rank's model_optim_rng.pt; its distrib_optim.pt, if a rank that reads it needs one."""
        moves = self.moves
        places = [
            [_Place(n, s.key, moves[s.name]) for s in chunk if s.name and has_optimizer_state(s.name)]
            for n, chunk in enumerate(slots)
        ]
        optimizer = _RankOptimizer(self, writer, rank, places)
        return {"optimizer": optimizer.item()}, optimizer.files()


@dataclass(frozen=True, slots=True)
class _RankOptimizer:
    beside: OptimizerBeside
    writer: LegacyWriter
    rank: FileRank
    places: list[list[_Place]]
    """The parameters that the rank trains, chunk by chunk, in the order of the modules."""

    @property
    def _settings(self) -> OptimizerSettings:
        return self.beside.settings

    def item(self) -> Any:
        made: list[dict[str, Any]] = []
        for number, groups in enumerate(self._settings.parts):
            if self.beside.kind == "distributed":
                made.append(distributed_part(groups, self._settings))
            else:
                made.append(self._plain(groups, [place for chunk in self._chunks(number) for place in chunk]))
        return chained(made, listed=True)

    def files(self) -> list[OutputFile]:
        if self.beside.kind != "distributed":
            return []
        layout, rank = self.writer.layout, self.rank
        readers = (layout.tp, layout.ep * layout.expert_tp)
        parts = [
            self._flat(number) if (rank.tp, rank.ep) in self._pairs(readers[number]) else None
            for number in range(len(self._settings.parts))
        ]
        if all(part is None for part in parts):
            return []
        tree = parts if len(parts) > 1 else parts[0]
        return [archive_file(f"{self.writer.folder_of(rank)}/{BUFFERS}", tree)]

    def _pairs(self, ranks: int) -> set[tuple[int, int]]:
        """The (tp, ep) ranks of a stage's first ranks: those that are first among their data-parallel replicas."""
        layout = self.writer.layout
        return {(rank % layout.tp, rank // layout.expert_tp % layout.ep) for rank in range(ranks)}

    def _chunks(self, part: int) -> list[list[_Place]]:
        """One optimizer's parameters, chunk by chunk."""
        if len(self._settings.parts) == 1:
            return self.places
        return [[p for p in chunk if (p.move.expert is not None) == (part == 1)] for chunk in self.places]

    def _slice(self, place: _Place, state: str = "") -> LazyTensor:
        return self.writer.slice_of(self.rank, place.move, state)

    def _leaf(self, place: _Place, state: str) -> Leaf:
        rank = self.writer.folder_of(self.rank)
        return Leaf(moment_name(rank, state, place.chunk, place.key), self._slice(place, state))

    def _plain(self, groups: Sequence[Group], places: Sequence[_Place]) -> dict[str, Any]:
        settings = self._settings
        state: dict[int, dict[str, Any]] = {}
        made: list[Group] = []
        masters: list[list[Leaf]] = []
        half = False
        for group in groups:
            members = [place for place in places if self._group_of(place, groups) is group]
            indices = list(range(len(state), len(state) + len(members)))
            counted = {"step": settings.step} if settings.step is not None and not settings.per_parameter_step else {}
            made.append(group | counted | {"params": indices})
            masters.append([])
            for index, place in zip(indices, members, strict=True):
                step = {"step": torch.tensor(settings.step, dtype=torch.float32)} if settings.per_parameter_step else {}
                state[index] = step | {name: self._leaf(place, name) for name in _STATES[1:]}
                if self._slice(place).dtype != torch.float32:
                    half = True
                    masters[-1].append(self._leaf(place, "param"))
        half = half or bool(getattr(self.beside.args, "bf16", False) or getattr(self.beside.args, "fp16", False))
        inner = {"state": state, "param_groups": made}
        return plain_part(inner, settings, mixed_precision=half) | ({"fp32_from_fp16_params": masters} if half else {})

    def _group_of(self, place: _Place, groups: Sequence[Group]) -> Group:
        """The group that Megatron puts a parameter in. Raises NotSupportedError when the source has no such group."""
        norm = place.key.endswith(("q_layernorm.weight", "k_layernorm.weight"))
        undecayed = is_undecayed(place.key, place.move.shape) and not (
            norm and getattr(self.beside.args, "apply_wd_to_qk_layernorm", False)
        )
        decoupled = getattr(self.beside.args, "decoupled_lr", None) is not None and place.move.name in (EMBEDDING, HEAD)
        for group in groups:
            if (wd_mult(group) == 0.0) == undecayed and (is_decoupled(group) == decoupled):
                return group
        raise NotSupportedError(
            f"the optimizer has no parameter group for {place.move.name} "
            f"(wd_mult {0.0 if undecayed else 1.0}); carry the weights alone with --no-optimizer"
        )

    def _flat(self, part: int) -> dict[Any, Any]:
        """DistributedOptimizer.get_parameter_state_dp_zero(): the buffers of every chunk, one state after the other."""
        layout, config = self.writer.layout, self.writer.config
        numel = sum(prod(self._slice(place).shape) for chunk in self.places for place in chunk)
        size = bucket_size(self.beside.args, numel=numel, data_parallel_size=self.beside.data_parallel_size)
        shared = layout.pp > 1 and config.share_embeddings_and_output_weights
        made: dict[Any, Any] = {"buckets_coalesced": True}
        for number, chunk in enumerate(self._chunks(part)):
            by_dtype: dict[torch.dtype, list[_Place]] = {}
            for place in chunk:
                by_dtype.setdefault(self._slice(place).dtype, []).append(place)
            for dtype, places in by_dtype.items():
                flats = [Flat(prod(self._slice(p).shape), alone=shared and p.move.name == EMBEDDING) for p in places]
                starts, total = buffer_layout(flats, size if self.rank.pp == 0 and number == 0 else None)
                rank = self.writer.folder_of(self.rank)
                tensors: dict[str, Any] = {}
                for state in _STATES:
                    placed = [(s, self._slice(p, state)) for s, p in zip(starts, places, strict=True)]
                    tensors[state] = Leaf(buffer_name(rank, part, len(made) - 1, state), Buffer(placed, total))
                made[len(made) - 1] = {(dtype, self._gradient_dtype(dtype)): tensors | {"numel_unpadded": total}}
        return made

    def _gradient_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Megatron-LM reduces bf16's gradients in fp32 unasked, fp16's where it is told to."""
        told = getattr(self.beside.args, "accumulate_allreduce_grads_in_fp32", None)
        wide = dtype == torch.bfloat16 if told is None else bool(told)
        return torch.float32 if wide else dtype


class Buffer(LazyTensor):
    """Tensors flat in one buffer, each from its first element on; zeros between them."""

    def __init__(self, placed: Sequence[tuple[int, LazyTensor]], total: int) -> None:
        self.shape, self.dtype = (total,), placed[0][1].dtype if placed else torch.float32
        self._placed = sorted(placed, key=lambda entry: entry[0])

    def read_rows(self, start: int, stop: int) -> Tensor:
        out = torch.zeros(stop - start, dtype=self.dtype)
        for at, tensor in self._placed:
            low, high = max(start, at), min(stop, at + prod(tensor.shape))
            if low < high:
                out[low - start : high - start] = _elements(tensor, low - at, high - at)
        return out

    @property
    def work_row_nbytes(self) -> int:
        """A slice of columns is read with the columns beside it, so an element may take more than its own bytes."""
        dearest = max((-(-t.work_row_nbytes // max(1, prod(t.shape[1:]))) for _, t in self._placed), default=0)
        return self.dtype.itemsize + dearest

    def extents(self) -> Sequence[Extent] | None:
        size = self.dtype.itemsize
        found: list[Extent] = []
        at = 0
        for start, tensor in self._placed:
            extents = tensor.extents()
            if extents is None:
                return None
            found += [Extent(None, 0, (start - at) * size)] if start > at else []
            found += extents
            at = start + prod(tensor.shape)
        return [*found, *([Extent(None, 0, (self.shape[0] - at) * size)] if self.shape[0] > at else [])]


def _elements(tensor: LazyTensor, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of a tensor in row-major order; only the rows that hold them are read."""
    width = prod(tensor.shape[1:])
    first = start // width
    rows = tensor.read_rows(first, -(-stop // width)).reshape(-1)
    return rows[start - first * width : stop - first * width]
