"""Qwen1.5-MoE and Qwen2-57B-A14B: experts beside one shared expert that a sigmoid weighs."""

from __future__ import annotations

from ckptbridge.converters.families.attention import (
    ATTENTION,
    DENSE_MLP,
    HEAD_DIM,
    MODEL_ENDS,
    MOE_FIELDS,
    NORM_TOPK_PROB,
    QKV_BIAS,
    SHARED_EXPERT,
    SIZE_FIELDS,
    moe_mlp,
)
from ckptbridge.converters.fields import Lacks, Must, Pair, SparseLayers
from ckptbridge.converters.mapping import Family
from ckptbridge.converters.rope_fields import Rope
from ckptbridge.converters.window_fields import EVERY_SECOND_LAYER

QWEN2_MOE = Family(
    name="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    params=MODEL_ENDS
    + ATTENTION
    + QKV_BIAS
    + DENSE_MLP
    + moe_mlp("mlp", gate_proj="gate_proj", up_proj="up_proj", down_proj="down_proj")
    + SHARED_EXPERT,
    fields=(
        *SIZE_FIELDS,
        *MOE_FIELDS,
        HEAD_DIM,
        NORM_TOPK_PROB,
        Pair("num_experts", "num_moe_experts", spellings=("num_local_experts",)),
        Pair("intermediate_size", "ffn_hidden_size"),
        Pair("moe_intermediate_size", "moe_ffn_hidden_size"),
        Pair("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
        Pair("qkv_bias", "add_qkv_bias", default=True),
        Pair("rms_norm_eps", "layernorm_epsilon", default=1e-6),
        SparseLayers(),
        EVERY_SECOND_LAYER,
        Must("use_mrope", False, write=False),
        Rope(),
        Lacks("moe_shared_expert_gate", True),
        Lacks("qk_layernorm", False),
    ),
)
