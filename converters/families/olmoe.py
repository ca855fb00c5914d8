"""OLMoE: every layer a mixture of small experts; one norm over all queries, and one over all keys."""

from __future__ import annotations

from ckptbridge.converters.families.attention import (
    ATTENTION_BIAS,
    BIASED_ATTENTION,
    HEAD_DIM,
    MODEL_ENDS,
    MOE_MLP,
    NORM_TOPK_PROB,
    ONE_WIDTH,
    QK_NORM,
    SIZE_FIELDS,
)
from ckptbridge.converters.fields import Lacks, Must, Pair
from ckptbridge.converters.mapping import Family
from ckptbridge.converters.rope_fields import Rope

OLMOE = Family(
    name="olmoe",
    architecture="OlmoeForCausalLM",
    params=MODEL_ENDS + BIASED_ATTENTION + QK_NORM + MOE_MLP,
    fields=(
        *SIZE_FIELDS,
        Pair("num_experts_per_tok", "moe_router_topk"),
        Pair("router_aux_loss_coef", "moe_aux_loss_coeff", default=0.01),
        HEAD_DIM,
        NORM_TOPK_PROB,
        Pair("num_experts", "num_moe_experts", default=64, spellings=("num_local_experts",)),
        *ONE_WIDTH,
        Pair("rms_norm_eps", "layernorm_epsilon", default=1e-5),
        *ATTENTION_BIAS,
        Must("clip_qkv", None),
        Rope(),
        Lacks("qk_layernorm", True),
        Lacks("qk_layernorm_whole", True),
    ),
)
