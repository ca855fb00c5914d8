"""MiniMax-M2: a sigmoid router with a bias for each expert, a part of each head that turns, norms over whole rows."""

from __future__ import annotations

from ckptbridge.converters.families.attention import (
    ATTENTION,
    BLOCK_SPARSE_MOE,
    MODEL_ENDS,
    MOE_FIELDS,
    ONE_WIDTH,
    QK_NORM,
    SIZE_FIELDS,
    H,
    M,
)
from ckptbridge.converters.fields import Irrelevant, Lacks, Must, Pair
from ckptbridge.converters.mapping import Family, Param
from ckptbridge.converters.rope_fields import Rope

MINIMAX_M2 = Family(
    name="minimax_m2",
    architecture="MiniMaxM2ForCausalLM",
    params=MODEL_ENDS
    + ATTENTION
    + QK_NORM
    + BLOCK_SPARSE_MOE
    + (Param(f"{M}.mlp.router.expert_bias", f"{H}.block_sparse_moe.e_score_correction_bias"),),
    fields=(
        *SIZE_FIELDS,
        *MOE_FIELDS,
        Pair("head_dim", "kv_channels", default=128),
        Pair("num_local_experts", "num_moe_experts", spellings=("num_experts",)),
        *ONE_WIDTH,
        Pair("rms_norm_eps", "layernorm_epsilon", default=1e-6),
        Rope(default_theta=5e6, partial=1.0, rotary_dim="rotary_dim"),
        Must("router_jitter_noise", 0.0),
        # Published files say of the class what it does anyway; the rest are parts that M2 does not have.
        Must("scoring_func", "sigmoid", write=False),
        Must("use_routing_bias", True, write=False),
        Must("use_qk_norm", True, write=False),
        Must("qk_norm_type", "per_layer", write=False),
        Must("shared_intermediate_size", 0, write=False),
        Must("sliding_window", None, write=False),
        Irrelevant(("attn_type_list", "mlp_intermediate_size", "shared_moe_mode")),
        Irrelevant(("layernorm_full_attention_beta", "layernorm_linear_attention_beta", "layernorm_mlp_beta")),
        Irrelevant(("use_mtp", "num_mtp_modules", "mtp_transformer_layers")),
        Lacks("qk_layernorm", True),
        Lacks("qk_layernorm_whole", True),
        Lacks("moe_router_score_function", "sigmoid"),
        Lacks("moe_router_enable_expert_bias", True),
    ),
)
