"""Megatron's legacy `torch` checkpoint, planned before a tensor is read: one torch.save file for each rank.

Files say slices, so only a run of the named layout loads them. They hold what the rank's own modules would save:
their names, in their order, with their empty extra states.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from ckptbridge.converters.archive_file import Leaf, archive_file
from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.mapping import Family, Move
from ckptbridge.converters.mcore.args import make_args
from ckptbridge.converters.mcore.legacy.names import DIALECTS, Dialect, Slot, chunk_slots, stock_of
from ckptbridge.converters.mcore.legacy.rank import FILE, rank_label
from ckptbridge.converters.mcore.legacy.ranks import rank_folder
from ckptbridge.converters.mcore.legacy.slices import boxes_of, cut
from ckptbridge.converters.mcore.megatron_folder import MegatronPlan
from ckptbridge.converters.mcore.torch_dist_writer import VOCAB_MULTIPLE
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.output import OutputFile
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.tensors import Checkpoint, LazyTensor, Zeros, join_rows


@dataclass(frozen=True, slots=True)
class FileRank:
    """The ranks that a file's name tells."""

    tp: int
    pp: int
    ep: int


Beside = Callable[["LegacyWriter", FileRank, list[list[Slot]]], tuple[Mapping[str, Any], Sequence[OutputFile]]]
"""(writer, rank, what each chunk of its model holds) -> (items for the rank's file, files beside it).

Tensors in the items are `archive_file.Leaf`s.
"""


@dataclass(slots=True, kw_only=True)
class LegacyWriter:
    """Collects parameters and lays them out, rank by rank. `names` is the dialect of the modules that will load them.

    Files are written for the pairs of a TP and an EP rank that Megatron's order of ranks knows, which are fewer than
    the names have room for where experts are cut less than the rest: 256 files in place of 2048 at TP 8, PP 8, EP 32,
    ETP 1.
    `beside` makes of the optimizer's states that were added what a rank saves of them.
    Raises BadInputError for other names, NotSupportedError for a layout that file names cannot hold.
    """

    family: Family
    config: ModelConfig
    layout: ParallelLayout
    dtype: torch.dtype
    names: str = "te"
    beside: Beside | None = None
    _states: dict[str, Checkpoint] = field(default_factory=dict[str, Checkpoint])
    _moves: dict[str, Move] = field(default_factory=dict[str, Move])
    _cuts: dict[tuple[str, str, int], LazyTensor] = field(default_factory=dict[tuple[str, str, int], LazyTensor])

    def __post_init__(self) -> None:
        if self.names not in DIALECTS:
            raise BadInputError(f"{self.names!r} are no names of Megatron's modules; there are {', '.join(DIALECTS)}")
        self.layout.check(self.config)
        self._moves = {move.name: move for move in self.family.moves(self.config)}
        if self.config.multi_latent_attention and self.names == "local" and self.layout.tp > 1:
            raise NotSupportedError(
                "Megatron's own modules cut the down-projections of latent attention over tensor parallel ranks, those "
                "of Transformer Engine do not: write the names te, or a tensor parallel size of 1"
            )
        etp, tp = self.layout.expert_tp, self.layout.tp
        if self.config.num_moe_experts is not None and tp % etp:
            raise NotSupportedError(
                f"experts are cut in {etp}, other weights in {tp}: names of legacy files tell no ETP rank, so an "
                "ETP size has to divide the TP size; write torch_dist, or choose another layout"
            )

    @property
    def padded_vocab_size(self) -> int:
        multiple = VOCAB_MULTIPLE * self.layout.tp
        return -(-self.config.vocab_size // multiple) * multiple

    def add_model(self, tensors: Checkpoint, state: str = "") -> None:
        """One state of every parameter, by its name with layer and expert numbers."""
        self._states[state] = tensors

    def args(self) -> Namespace:
        """The arguments that describe this model and layout."""
        args = make_args(
            self.config,
            padded_vocab_size=self.padded_vocab_size,
            layout=self.layout,
            dtype=self.dtype,
            ckpt_format="torch",
        )
        return self._of_modules(args)

    def _of_modules(self, args: Namespace) -> Namespace:
        """The arguments with what they say of the modules that will load the files."""
        told = Namespace(**vars(args))
        told.moe_grouped_gemm = self.names == "te" and self.config.num_moe_experts is not None
        told.transformer_impl = "transformer_engine" if self.names.startswith("te") else "local"
        told.use_legacy_models = self.names == "oldest"
        return told

    def plan(
        self,
        common: Mapping[str, Any],
        *,
        args: Namespace | None = None,
        iteration: int = 0,
        content_metadata: Mapping[str, Any] | None = None,
    ) -> MegatronPlan:
        """The files of everything that was added. `content_metadata` is torch_dist's and left out."""
        if self.beside is None and (states := sorted(set(self._states) - {""})):
            raise NotSupportedError(f"the optimizer's {', '.join(states)} cannot be written to this legacy checkpoint")
        described = self._of_modules(args) if args is not None else self.args()
        slots = self.slots()
        files: list[OutputFile] = []
        for rank in self.ranks():
            items: Mapping[str, Any] = {}
            others: Sequence[OutputFile] = ()
            if self.beside is not None:
                items, others = self.beside(self, rank, slots(rank))
            tree: dict[str, Any] = {
                "args": self._args_of(rank, described),
                "checkpoint_version": 3.0,
                "iteration": iteration,
                **self._models(rank, slots(rank)),
                **items,
                **common,
            }
            files += [archive_file(f"{self.folder_of(rank)}/{FILE}", tree), *others]
        return MegatronPlan(files=files, last=[])

    def ranks(self) -> list[FileRank]:
        """The ranks that have a file of their own."""
        return [FileRank(tp, pp, ep) for pp in range(self.layout.pp) for tp, ep in self.layout.file_ranks()]

    def folder_of(self, rank: FileRank) -> str:
        """The rank's folder: mp_rank_00_001."""
        return rank_folder(self.layout.pp > 1, self.layout.ep > 1, rank.tp, rank.pp, rank.ep)

    def slots(self) -> Callable[[FileRank], list[list[Slot]]]:
        """What each chunk of a rank's model holds, in the order of its modules. Tensor parallel ranks share it.

        Raises NotSupportedError naming a parameter for which the dialect has no name.
        """
        layout, stock = self.layout, stock_of(self.family, self.config)
        stages = layout.stages(self.config.num_layers)
        experts_here = (self.config.num_moe_experts or 0) // layout.ep
        known: dict[tuple[int, int], list[list[Slot]]] = {}

        def of(rank: FileRank) -> list[list[Slot]]:
            if (rank.pp, rank.ep) not in known:
                experts = range(rank.ep * experts_here, (rank.ep + 1) * experts_here)
                known[rank.pp, rank.ep] = [
                    chunk_slots(
                        cast(Dialect, self.names),
                        stock,
                        layers,
                        experts,
                        first=rank.pp == 0 and chunk == 0,
                        last=rank.pp == layout.pp - 1 and chunk == layout.vpp - 1,
                    )
                    for chunk, layers in enumerate(stages[rank.pp])
                ]
            return known[rank.pp, rank.ep]

        return of

    def slice_of(self, rank: FileRank, move: Move, state: str = "") -> LazyTensor:
        """What a rank holds of one state of a parameter, the vocabulary padded."""
        part = rank.tp if move.expert is None else rank.tp % self.layout.expert_tp
        part = part if move.layout.tp is not None else 0
        key = (state, move.name, part)
        if key not in self._cuts:
            self._cuts[key] = self._cut(self._states[state][move.name], move, part)
        return self._cuts[key]

    def _cut(self, tensor: LazyTensor, move: Move, part: int) -> LazyTensor:
        if move.layout.is_vocab and (extra := self.padded_vocab_size - tensor.shape[0]):
            tensor = join_rows([tensor, Zeros((extra, *tensor.shape[1:]), tensor.dtype)])
        if move.layout.tp is None:
            return tensor
        size = self.layout.tp if move.expert is None else self.layout.expert_tp
        return cut(tensor, boxes_of(move.layout, tensor.shape, self.config, size)[part])

    def _models(self, rank: FileRank, chunks: list[list[Slot]]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for number, slots in enumerate(chunks):
            chunk = number if len(chunks) > 1 else None
            held = {
                slot.key: Leaf(
                    rank_label(self.folder_of(rank), chunk, slot.key), self.slice_of(rank, self._moves[slot.name])
                )
                if slot.name is not None
                else None
                for slot in slots
            }
            made["model" if chunk is None else f"model{chunk}"] = _nested(held) if self.names == "oldest" else held
        return made

    def _args_of(self, rank: FileRank, args: Namespace) -> Namespace:
        """The arguments as the first rank that saves this file has them, so that a misplaced file shows."""
        layout = self.layout
        own = Namespace(**vars(args))
        within = (
            number
            for number in range(layout.ranks_per_stage)
            if (number % layout.tp, number // layout.expert_tp % layout.ep) == (rank.tp, rank.ep)
        )
        if (first := next(within, None)) is not None:
            own.rank = rank.pp * layout.ranks_per_stage + first
            own.world_size = layout.world_size
        return own


def _nested(held: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as the oldest Megatron-LM nests them: modules apart, the stack of layers as one flat dictionary."""
    nested: dict[str, Any] = {}
    for key, value in held.items():
        *path, name = key.split(".", 2) if key.startswith("language_model.encoder.") else key.split(".")
        within = nested
        for step in path:
            within = within.setdefault(step, {})
        within[name] = value
    return nested
