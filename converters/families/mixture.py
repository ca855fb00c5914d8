"""Rows and fields of mixtures as DeepSeek has them: shared experts, groups of experts, a router of sigmoids."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from ckptbridge.converters.errors import BadInputError, NotSupportedError, told
from ckptbridge.converters.families.attention import DENSE_MLP, MOE_MLP, H, M
from ckptbridge.converters.fields import FieldRow, Irrelevant, Json, Lacks, Pair
from ckptbridge.converters.layout import COPY, GATED, ROW
from ckptbridge.converters.mapping import Param
from ckptbridge.converters.model_config import ModelConfig


def _has_shared_experts(config: ModelConfig, layer: int) -> bool:
    return config.is_moe_layer(layer) and config.moe_shared_expert_intermediate_size is not None


_SHARED_EXPERTS = (
    Param(
        f"{M}.mlp.shared_experts.linear_fc1.weight",
        (f"{H}.mlp.shared_experts.gate_proj.weight", f"{H}.mlp.shared_experts.up_proj.weight"),
        GATED,
        when=_has_shared_experts,
    ),
    Param(
        f"{M}.mlp.shared_experts.linear_fc2.weight",
        f"{H}.mlp.shared_experts.down_proj.weight",
        ROW,
        when=_has_shared_experts,
    ),
)

EXPERT_BIAS = (
    Param(
        f"{M}.mlp.router.expert_bias",
        f"{H}.mlp.gate.e_score_correction_bias",
        COPY,
        when=lambda config, layer: config.is_moe_layer(layer) and config.moe_router_enable_expert_bias,
    ),
)

MIXTURE = DENSE_MLP + MOE_MLP + EXPERT_BIAS + _SHARED_EXPERTS
"""Dense layers and mixtures."""


@dataclass(frozen=True)
class SharedExperts(FieldRow):
    """How many experts every token meets: Megatron has one of all their width."""

    @property
    def hf_names(self) -> tuple[str, ...]:
        return ("n_shared_experts",)

    def to_mcore(self, hf: Json) -> Json:
        count = hf.get("n_shared_experts") or 0
        return {"moe_shared_expert_intermediate_size": count * hf["moe_intermediate_size"] if count else None}

    def to_hf(self, config: ModelConfig) -> Json:
        shared, width = config.moe_shared_expert_intermediate_size or 0, config.moe_ffn_hidden_size
        if not width or shared % width:
            raise NotSupportedError(
                f"the shared expert is {shared} wide, which is no multiple of moe_ffn_hidden_size {width}"
            )
        return {"n_shared_experts": shared // width or None}


@dataclass(frozen=True)
class DenseFirst(FieldRow):
    """`first_k_dense_replace`: the first layers are dense, all others mixtures."""

    default: int = 0

    @property
    def hf_names(self) -> tuple[str, ...]:
        return ("first_k_dense_replace",)

    def to_mcore(self, hf: Json) -> Json:
        dense, layers = hf.get("first_k_dense_replace"), hf["num_hidden_layers"]
        dense = self.default if dense is None else dense
        if type(dense) is not int or type(layers) is not int or not 0 <= dense <= layers <= 10_000:
            raise BadInputError(
                f"config.json: first_k_dense_replace is {told(dense)}, num_hidden_layers {told(layers)}: expected "
                "whole numbers, the first not larger than the second"
            )
        return {"moe_layer_freq": (0,) * dense + (1,) * (layers - dense) if dense else 1}

    def to_hf(self, config: ModelConfig) -> Json:
        return {"first_k_dense_replace": sum(not config.is_moe_layer(layer) for layer in range(config.num_layers))}


@dataclass(frozen=True)
class ExpertGroups(FieldRow):
    """`n_group` and `topk_group`; one group of all experts is no group."""

    default: tuple[int, int] = (1, 1)

    @property
    def hf_names(self) -> tuple[str, ...]:
        return ("n_group", "topk_group")

    def to_mcore(self, hf: Json) -> Json:
        found = [
            default if hf.get(name) is None else hf[name]
            for name, default in zip(self.hf_names, self.default, strict=True)
        ]
        groups, chosen = found
        experts = hf.get("n_routed_experts")
        if type(groups) is not int or type(chosen) is not int or not 1 <= chosen <= groups:
            raise BadInputError(
                f"config.json: n_group is {told(groups)}, topk_group {told(chosen)}: expected 1 or more"
            )
        if type(experts) is int and experts % groups:
            raise BadInputError(f"config.json: n_group = {groups} does not divide n_routed_experts = {experts}")
        if groups == 1:
            return {"moe_router_num_groups": None, "moe_router_group_topk": None}
        return {"moe_router_num_groups": groups, "moe_router_group_topk": chosen}

    def to_hf(self, config: ModelConfig) -> Json:
        return {"n_group": config.moe_router_num_groups or 1, "topk_group": config.moe_router_group_topk or 1}


def scaling_factor(default: float) -> Pair:
    """`routed_scaling_factor`: what the weights of the chosen experts are multiplied by."""
    return Pair(
        "routed_scaling_factor",
        "moe_router_topk_scaling_factor",
        default=default,
        convert=(lambda factor: None if factor == 1 else factor, lambda factor: 1.0 if factor is None else factor),
    )


MIXTURE_FIELDS: tuple[FieldRow, ...] = (
    Pair("n_routed_experts", "num_moe_experts", spellings=("num_local_experts",)),
    Pair("num_experts_per_tok", "moe_router_topk"),
    Pair("moe_intermediate_size", "moe_ffn_hidden_size"),
    Pair("intermediate_size", "ffn_hidden_size"),
    SharedExperts(),
    # Losses of training, and how many machines the authors spread the experts over.
    Pair("aux_loss_alpha", "moe_aux_loss_coeff", default=0.0),
    Irrelevant(("seq_aux", "ep_size")),
)

SIGMOID_ROUTER: tuple[FieldRow, ...] = (
    Lacks("moe_router_score_function", "sigmoid"),
    Lacks("moe_router_enable_expert_bias", True),
    ExpertGroups(),
    Pair("norm_topk_prob", "moe_router_pre_softmax", default=True, convert=(operator.not_, operator.not_)),
)
"""DeepSeek-V3's, which others have taken over."""
