"""Degrees of parallelism and what follows from them: which rank holds which layer, expert and slice.

Dense parameters live on TP x PP, experts on ETP x EP x PP, both over the same ranks, in Megatron-Core's order
(tp fastest, then ep or dp, pp slowest). Pure arithmetic: nothing here knows torch.distributed.
"""

from __future__ import annotations

from dataclasses import dataclass
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

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "vpp", "ep"):
            if getattr(self, name) < 1:
                raise BadInputError(f"{name} is {getattr(self, name)}: a parallel size is at least 1")
        if self.etp is not None and self.etp < 1:
            raise BadInputError(f"etp is {self.etp}: a parallel size is at least 1")
        if self.vpp > 1 and self.pp == 1:
            raise BadInputError(f"vpp is {self.vpp}, but virtual stages need a pipeline: give pp > 1")

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
        chunks = self.pp * self.vpp
        _divides("pp x vpp", chunks, "num_layers", config.num_layers)
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

    def stage_of_layer(self, layer: int, num_layers: int) -> int:
        """The pipeline rank of a layer: chunks are dealt to the ranks in turn."""
        return layer // (num_layers // (self.pp * self.vpp)) % self.pp

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
