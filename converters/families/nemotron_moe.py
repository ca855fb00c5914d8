"""Nemotron-4 with experts, as upcycling makes it: squared ReLU without a gated half, LayerNorm1P with biases.

No class of transformers computes it, so its config.json names ModelConfig's own fields and stands beside Megatron
checkpoints only.
"""

from __future__ import annotations

from ckptbridge.converters.families.attention import ATTENTION, MODEL_ENDS, H, M
from ckptbridge.converters.families.mixture import EXPERT_BIAS
from ckptbridge.converters.families.nemotron import DENSE_MLP, NEMOTRON_FIELDS, NORM_BIASES
from ckptbridge.converters.fields import SparseLayers, same
from ckptbridge.converters.layout import COLUMN, COPY, ROW
from ckptbridge.converters.mapping import Family, Param
from ckptbridge.converters.model_config import ModelConfig


def _has_shared_expert(config: ModelConfig, layer: int) -> bool:
    return config.is_moe_layer(layer) and config.moe_shared_expert_intermediate_size is not None


def _has_gated_shared_expert(config: ModelConfig, layer: int) -> bool:
    return _has_shared_expert(config, layer) and config.moe_shared_expert_gate


_MLP, _HF_MLP = f"{M}.mlp", f"{H}.mlp"
_EXPERT, _HF_EXPERT = f"{_MLP}.experts.experts.{{expert}}", f"{_HF_MLP}.experts.{{expert}}"
_IS_MOE = ModelConfig.is_moe_layer
_MIXTURE = (
    Param(f"{M}.pre_mlp_layernorm.weight", f"{H}.post_attention_layernorm.weight", COPY, when=_IS_MOE),
    Param(f"{M}.pre_mlp_layernorm.bias", f"{H}.post_attention_layernorm.bias", COPY, when=_IS_MOE),
    Param(f"{_MLP}.router.weight", f"{_HF_MLP}.gate.weight", COPY, when=_IS_MOE),
    Param(f"{_EXPERT}.linear_fc1.weight", f"{_HF_EXPERT}.up_proj.weight", COLUMN, when=_IS_MOE),
    Param(f"{_EXPERT}.linear_fc2.weight", f"{_HF_EXPERT}.down_proj.weight", ROW, when=_IS_MOE),
)
_SHARED = (
    Param(
        f"{_MLP}.shared_experts.linear_fc1.weight",
        f"{_HF_MLP}.shared_experts.up_proj.weight",
        COLUMN,
        when=_has_shared_expert,
    ),
    Param(
        f"{_MLP}.shared_experts.linear_fc2.weight",
        f"{_HF_MLP}.shared_experts.down_proj.weight",
        ROW,
        when=_has_shared_expert,
    ),
    Param(
        f"{_MLP}.shared_experts.gate_weight",
        f"{_HF_MLP}.shared_expert_gate.weight",
        COPY,
        when=_has_gated_shared_expert,
    ),
)

NEMOTRON_MOE = Family(
    name="nemotron_moe",
    architecture="NemotronMoeOfMegatronOnly",
    no_hf_class=(
        "its experts are plain squared ReLU behind LayerNorm with biases, and its heads turn with the position; "
        "the nearest class of transformers, NemotronH, has RMSNorm and no rotary embedding"
    ),
    params=MODEL_ENDS + ATTENTION + NORM_BIASES + DENSE_MLP + _MIXTURE + EXPERT_BIAS + _SHARED,
    fields=(
        *NEMOTRON_FIELDS,
        same("num_moe_experts"),
        same("moe_ffn_hidden_size"),
        same("moe_router_topk"),
        same("moe_router_pre_softmax", False),
        same("moe_router_score_function", "softmax"),
        same("moe_router_enable_expert_bias", False),
        same("moe_router_topk_scaling_factor", None),
        same("moe_router_num_groups", None),
        same("moe_router_group_topk", None),
        same("moe_shared_expert_intermediate_size", None),
        same("moe_shared_expert_gate", False),
        same("moe_aux_loss_coeff", 0.0),
        SparseLayers(),
    ),
)
