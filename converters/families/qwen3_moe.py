"""Qwen3-30B-A3B and 235B-A22B: Qwen3 with many small experts and no shared one."""

from __future__ import annotations

from ckptbridge.converters.families.attention import (
    ATTENTION,
    ATTENTION_BIAS,
    DENSE_MLP,
    HEAD_DIM,
    MODEL_ENDS,
    MOE_FIELDS,
    NORM_TOPK_PROB,
    PROJECTION_BIAS,
    QK_NORM,
    QKV_BIAS,
    SIZE_FIELDS,
    moe_mlp,
)
from ckptbridge.converters.fields import Lacks, Pair, SparseLayers
from ckptbridge.converters.mapping import Family
from ckptbridge.converters.rope_fields import Rope
from ckptbridge.converters.window_fields import EVERY_LAYER

QWEN3_MOE = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    params=MODEL_ENDS
    + ATTENTION
    + QKV_BIAS
    + PROJECTION_BIAS
    + QK_NORM
    + DENSE_MLP
    + moe_mlp("mlp", gate_proj="gate_proj", up_proj="up_proj", down_proj="down_proj"),
    fields=(
        *SIZE_FIELDS,
        *MOE_FIELDS,
        NORM_TOPK_PROB,
        # transformers 5 writes num_local_experts, the published files num_experts; its class reads both.
        Pair("num_experts", "num_moe_experts", spellings=("num_local_experts",)),
        HEAD_DIM,
        Pair("intermediate_size", "ffn_hidden_size"),
        Pair("moe_intermediate_size", "moe_ffn_hidden_size"),
        Pair("rms_norm_eps", "layernorm_epsilon", default=1e-6),
        *ATTENTION_BIAS,
        SparseLayers(),
        EVERY_LAYER,
        Rope(),
        Lacks("qk_layernorm", True),
        Lacks("moe_shared_expert_intermediate_size", None),
        Lacks("moe_shared_expert_gate", False),
    ),
)
