"""OLMoE: every layer a mixture of small experts; one norm over all queries, and one over all keys."""

from __future__ import annotations

from ckptbridge.converters.families.attention import (
    ATTENTION,
    ATTENTION_BIAS,
    HEAD_DIM,
    MODEL_ENDS,
    NORM_TOPK_PROB,
    PROJECTION_BIAS,
    QK_NORM,
    QKV_BIAS,
    SIZE_FIELDS,
    moe_mlp,
)
from ckptbridge.converters.fields import Lacks, Must, Pair
from ckptbridge.converters.mapping import Family
from ckptbridge.converters.rope_fields import Rope

OLMOE = Family(
    name="olmoe",
    architecture="OlmoeForCausalLM",
    params=MODEL_ENDS
    + ATTENTION
    + QKV_BIAS
    + QK_NORM
    + PROJECTION_BIAS
    + moe_mlp("mlp", gate_proj="gate_proj", up_proj="up_proj", down_proj="down_proj"),
    fields=(
        *SIZE_FIELDS,
        Pair("num_experts_per_tok", "moe_router_topk"),
        Pair("router_aux_loss_coef", "moe_aux_loss_coeff", default=0.01),
        HEAD_DIM,
        NORM_TOPK_PROB,
        Pair("num_experts", "num_moe_experts", default=64, spellings=("num_local_experts",)),
        Pair("intermediate_size", "moe_ffn_hidden_size"),
        Pair("intermediate_size", "ffn_hidden_size"),
        Pair("rms_norm_eps", "layernorm_epsilon", default=1e-5),
        *ATTENTION_BIAS,
        Must("clip_qkv", None),
        Rope(),
        Lacks("qk_layernorm", True),
        Lacks("qk_layernorm_whole", True),
    ),
)
