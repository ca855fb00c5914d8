"""Qwen3-30B-A3B and 235B-A22B: Qwen3 with many small experts and no shared one."""

from __future__ import annotations

from ckptbridge.converters.families.attention import (
    ATTENTION_BIAS,
    BIASED_ATTENTION,
    DENSE_MLP,
    MODEL_ENDS,
    MOE_MLP,
    QK_NORM,
    QWEN_MOE_FIELDS,
)
from ckptbridge.converters.fields import Lacks
from ckptbridge.converters.mapping import Family
from ckptbridge.converters.window_fields import EVERY_LAYER

QWEN3_MOE = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    params=MODEL_ENDS + BIASED_ATTENTION + QK_NORM + DENSE_MLP + MOE_MLP,
    fields=(
        *QWEN_MOE_FIELDS,
        *ATTENTION_BIAS,
        EVERY_LAYER,
        Lacks("qk_layernorm", True),
        Lacks("moe_shared_expert_intermediate_size", None),
        Lacks("moe_shared_expert_gate", False),
    ),
)
