"""Qwen1.5-MoE and Qwen2-57B-A14B: experts beside one shared expert that a sigmoid weighs."""

from __future__ import annotations

from ckptbridge.converters.families.attention import (
    ATTENTION,
    DENSE_MLP,
    MODEL_ENDS,
    MOE_MLP,
    QKV_BIAS,
    QWEN_MOE_FIELDS,
    SHARED_EXPERT,
)
from ckptbridge.converters.fields import Lacks, Must, Pair
from ckptbridge.converters.mapping import Family
from ckptbridge.converters.window_fields import EVERY_SECOND_LAYER

QWEN2_MOE = Family(
    name="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    params=MODEL_ENDS + ATTENTION + QKV_BIAS + DENSE_MLP + MOE_MLP + SHARED_EXPERT,
    fields=(
        *QWEN_MOE_FIELDS,
        Pair("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
        Pair("qkv_bias", "add_qkv_bias", default=True),
        EVERY_SECOND_LAYER,
        Must("use_mrope", False, write=False),
        Lacks("moe_shared_expert_gate", True),
        Lacks("qk_layernorm", False),
    ),
)
