"""Mixtral 8x7B and 8x22B: every layer a mixture, weights of the chosen experts sum to one."""

from __future__ import annotations

from ckptbridge.converters.families.attention import (
    ATTENTION,
    BLOCK_SPARSE_MOE,
    HEAD_DIM,
    MODEL_ENDS,
    MOE_FIELDS,
    ONE_WIDTH,
    SIZE_FIELDS,
)
from ckptbridge.converters.fields import Lacks, Must, Pair
from ckptbridge.converters.mapping import Family
from ckptbridge.converters.rope_fields import Rope

MIXTRAL = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    params=MODEL_ENDS + ATTENTION + BLOCK_SPARSE_MOE,
    fields=(
        *SIZE_FIELDS,
        *MOE_FIELDS,
        HEAD_DIM,
        Pair("num_local_experts", "num_moe_experts"),
        *ONE_WIDTH,
        Pair("rms_norm_eps", "layernorm_epsilon", default=1e-5),
        Pair("sliding_window", "window_size", default=None),
        Rope(default_theta=1e6),
        Must("router_jitter_noise", 0.0),
        Lacks("moe_router_pre_softmax", False),
        Lacks("moe_layer_freq", 1),
        Lacks("moe_shared_expert_intermediate_size", None),
        Lacks("moe_shared_expert_gate", False),
        Lacks("add_qkv_bias", False),
        Lacks("qk_layernorm", False),
    ),
)
