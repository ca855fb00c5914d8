"""DeepSeek-V3, V3.1 and R1, and Kimi-K2, which is published as the same class: latent attention, a sigmoid router."""

from __future__ import annotations

import operator

from ckptbridge.converters.families.attention import DENSE_MLP, MODEL_ENDS, SIZE_FIELDS, moe_mlp
from ckptbridge.converters.families.further_tokens import COPIES, further_layers, further_tokens
from ckptbridge.converters.families.latent import (
    EXPERT_BIAS,
    LATENT_ATTENTION,
    LATENT_FIELDS,
    MIXTURE_FIELDS,
    SHARED_EXPERTS,
    DenseFirst,
    ExpertGroups,
    scaling_factor,
)
from ckptbridge.converters.fields import Lacks, Must, Pair
from ckptbridge.converters.mapping import Family
from ckptbridge.converters.rope_fields import Rope

_LAYER = (
    LATENT_ATTENTION
    + DENSE_MLP
    + moe_mlp("mlp", gate_proj="gate_proj", up_proj="up_proj", down_proj="down_proj")
    + EXPERT_BIAS
    + SHARED_EXPERTS
)

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    params=MODEL_ENDS + _LAYER + further_layers(_LAYER),
    fields=(
        Lacks("multi_latent_attention", True),
        Lacks("moe_router_score_function", "sigmoid"),
        Lacks("moe_router_enable_expert_bias", True),
        Lacks("qk_layernorm", True),
        *SIZE_FIELDS,
        *LATENT_FIELDS,
        *MIXTURE_FIELDS,
        ExpertGroups(),
        DenseFirst(default=3),
        scaling_factor(default=2.5),
        Pair("norm_topk_prob", "moe_router_pre_softmax", default=True, convert=(operator.not_, operator.not_)),
        further_tokens(default=1),
        Rope(kinds=("default", "yarn")),
        # The class norms latents with 1e-6 whatever it is told; Megatron has one epsilon for all norms.
        Must("rms_norm_eps", 1e-6),
        Lacks("layernorm_epsilon", 1e-6),
        Must("attention_bias", False),
        Must("rope_interleave", True),
        Must("moe_layer_freq", 1, write=False),
        Must("scoring_func", "sigmoid"),
        Must("topk_method", "noaux_tc"),
    ),
    copies=COPIES,
)
