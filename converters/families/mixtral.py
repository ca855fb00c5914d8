"""Mixtral 8x7B and 8x22B: every layer a mixture, weights of the chosen experts sum to one."""

from __future__ import annotations

from ckptbridge.converters.families.attention import (
    ATTENTION,
    HEAD_DIM,
    MODEL_ENDS,
    MOE_FIELDS,
    SIZE_FIELDS,
    moe_mlp,
)
from ckptbridge.converters.fields import Lacks, Must, Pair
from ckptbridge.converters.mapping import Family
from ckptbridge.converters.rope_fields import Rope

MIXTRAL = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    params=MODEL_ENDS + ATTENTION + moe_mlp("block_sparse_moe", gate_proj="w1", up_proj="w3", down_proj="w2"),
    fields=(
        *SIZE_FIELDS,
        *MOE_FIELDS,
        HEAD_DIM,
        Pair("num_local_experts", "num_moe_experts"),
        Pair("intermediate_size", "moe_ffn_hidden_size"),
        # Megatron takes the experts' width where no other is named; keep both equal so that either is right.
        Pair("intermediate_size", "ffn_hidden_size"),
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
