"""Degrees of parallelism and what follows from them: which rank holds which layer, expert and slice.

Dense parameters live on TP x PP, experts on ETP x EP x PP, both over the same ranks, in Megatron-Core's order
(tp fastest, then ep or dp, pp slowest). Pure arithmetic: nothing here knows torch.distributed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import lcm

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.model_config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelLayout:
    """Sizes of the parallel groups. `etp` of None is Megatron's default: the TP size."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    """Model chunks of each pipeline rank (Megatron: virtual stages per pipeline rank)."""
    ep: int = 1
    etp: int | None = None
    first_stage_layers: int | None = None
    """Layers of the first pipeline rank, all its chunks together (Megatron: --decoder-first-pipeline-num-layers)."""
    last_stage_layers: int | None = None
    """Layers of the last pipeline rank (Megatron: --decoder-last-pipeline-num-layers)."""

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "vpp", "ep"):
            if getattr(self, name) < 1:
                raise BadInputError(f"{name} is {getattr(self, name)}: a parallel size is at least 1")
        if self.etp is not None and self.etp < 1:
            raise BadInputError(f"etp is {self.etp}: a parallel size is at least 1")
        if self.vpp > 1 and self.pp == 1:
            raise BadInputError(f"vpp is {self.vpp}, but virtual stages need a pipeline: give pp > 1")
        for name in ("first_stage_layers", "last_stage_layers"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise BadInputError(f"{name} is {count}: a pipeline stage has at least 1 layer")
            if count is not None and self.pp == 1:
                raise BadInputError(f"{name} is {count}, but one stage holds every layer: give pp > 1")

    @property
    def expert_tp(self) -> int:
        return self.tp if self.etp is None else self.etp

    @property
    def ranks_per_stage(self) -> int:
        """The fewest ranks on which both the dense and the expert grid fit."""
        return lcm(self.tp, self.expert_tp * self.ep)

    @property
    def world_size(self) -> int:
        return self.pp * self.ranks_per_stage

    def check(self, config: ModelConfig) -> None:
        """Raises BadInputError in one sentence for sizes that this model cannot be cut into."""
        self.stages(config.num_layers)
        _divides("tp", self.tp, "num_attention_heads", config.num_attention_heads)
        _divides("tp", self.tp, "num_query_groups", config.num_query_groups)
        if any(not config.is_moe_layer(i) for i in range(config.num_layers)):
            _divides("tp", self.tp, "ffn_hidden_size", config.ffn_hidden_size)
        if config.num_moe_experts is None:
            if self.ep > 1 or (self.etp or 1) > 1:
                raise BadInputError(f"ep is {self.ep} and etp {self.etp}, but the model has no experts")
            return
        _divides("ep", self.ep, "num_moe_experts", config.num_moe_experts)
        _divides("etp", self.expert_tp, "moe_ffn_hidden_size", config.moe_ffn_hidden_size or 0)
        if config.moe_shared_expert_intermediate_size:
            _divides(
                "tp",
                self.tp,
                "moe_shared_expert_intermediate_size",
                config.moe_shared_expert_intermediate_size,
            )

    def stages(self, num_layers: int) -> list[list[range]]:
        """`stages(n)[pp_rank][chunk]` are the layers there: chunk after chunk, the ranks in turn, as Megatron deals.

        Raises BadInputError in one sentence when the layers cannot be dealt so.
        """
        return [list(chunks) for chunks in _stages(self, num_layers)]

    def stage_of_layer(self, layer: int, num_layers: int) -> int:
        """The pipeline rank of a layer; those behind the last, which predict further tokens, are where it is."""
        return _stage_of_layer(self, num_layers)[layer] if layer < num_layers else self.pp - 1

    def file_ranks(self) -> list[tuple[int, int]]:
        """The (tp, ep) ranks of a pipeline stage that exist together in Megatron's order of ranks.

        Both grids lie over the same ranks, so where experts are cut less than the rest only some pairs exist.
        """
        ranks = range(self.ranks_per_stage)
        return sorted({(rank % self.tp, rank // self.expert_tp % self.ep) for rank in ranks})

    def rank_of(self, stage: int, tp_rank: int = 0) -> int:
        """The first rank of a pipeline stage that holds a dense TP slice."""
        return stage * self.ranks_per_stage + tp_rank

    def rank_of_expert(self, stage: int, expert: int, num_experts: int, etp_rank: int = 0) -> int:
        """The first rank of a pipeline stage that holds an expert's ETP slice."""
        ep_rank = expert // (num_experts // self.ep)
        return stage * self.ranks_per_stage + ep_rank * self.expert_tp + etp_rank


def _divides(name: str, size: int, what: str, total: int) -> None:
    if total % size:
        raise BadInputError(f"{name} = {size} does not divide {what} = {total}")


@lru_cache(maxsize=256)
def _stages(layout: ParallelLayout, num_layers: int) -> tuple[tuple[range, ...], ...]:
    per_rank = _layers_per_rank(layout, num_layers)
    dealt: list[list[range]] = [[] for _ in range(layout.pp)]
    start = 0
    for _ in range(layout.vpp):
        for rank, count in enumerate(per_rank):
            dealt[rank].append(range(start, start + count // layout.vpp))
            start += count // layout.vpp
    return tuple(tuple(chunks) for chunks in dealt)


@lru_cache(maxsize=256)
def _stage_of_layer(layout: ParallelLayout, num_layers: int) -> tuple[int, ...]:
    """By layer: asked for once a parameter, 45,000 times for a 671B model."""
    stage = {layer: rank for rank, chunks in enumerate(_stages(layout, num_layers)) for c in chunks for layer in c}
    return tuple(stage[layer] for layer in range(num_layers))


def _layers_per_rank(layout: ParallelLayout, num_layers: int) -> list[int]:
    """As megatron-core's get_num_layers_to_build: what the ends leave is shared evenly by the ranks between."""
    first, last = layout.first_stage_layers, layout.last_stage_layers
    if first is None and last is None:
        if layout.pp > 1 and layout.vpp == 1 and num_layers % layout.pp:
            raise BadInputError(
                f"pp = {layout.pp} does not divide num_layers = {num_layers}; deal them unevenly with "
                "--decoder-first-pipeline-num-layers or --decoder-last-pipeline-num-layers"
            )
        _divides("pp x vpp" if layout.vpp > 1 else "pp", layout.pp * layout.vpp, "num_layers", num_layers)
        return [num_layers // layout.pp] * layout.pp
    left = num_layers - (first or 0) - (last or 0)
    between = layout.pp - (first is not None) - (last is not None)
    if left < 0 or (between and left % between) or (not between and left):
        raise BadInputError(
            f"of num_layers = {num_layers}, the first and last pipeline stage take {(first or 0) + (last or 0)}; "
            f"what is left, {left}, cannot be shared evenly by the other {between} stages"
        )
    counts = [left // between if between else 0] * layout.pp
    counts[0] = counts[0] if first is None else first
    counts[-1] = counts[-1] if last is None else last
    if uneven := [count for count in counts if count % layout.vpp]:
        raise BadInputError(f"vpp = {layout.vpp} does not divide the {uneven[0]} layers of a pipeline stage")
    return counts
