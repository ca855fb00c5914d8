"""GLM-4.5 and GLM-4.5-Air: partial rotary embedding, a sigmoid router as DeepSeek-V3's, a layer for further tokens."""

from __future__ import annotations

import operator

from ckptbridge.converters.families.attention import (
    ATTENTION,
    DENSE_MLP,
    HEAD_DIM,
    MODEL_ENDS,
    QK_NORM,
    QKV_BIAS,
    SIZE_FIELDS,
    moe_mlp,
)
from ckptbridge.converters.families.further_tokens import COPIES, further_layers, further_tokens
from ckptbridge.converters.families.latent import (
    EXPERT_BIAS,
    MIXTURE_FIELDS,
    SHARED_EXPERTS,
    DenseFirst,
    ExpertGroups,
    scaling_factor,
)
from ckptbridge.converters.fields import Lacks, Pair
from ckptbridge.converters.mapping import Family
from ckptbridge.converters.rope_fields import Rope

_LAYER = (
    ATTENTION
    + QKV_BIAS
    + QK_NORM
    + DENSE_MLP
    + moe_mlp("mlp", gate_proj="gate_proj", up_proj="up_proj", down_proj="down_proj")
    + EXPERT_BIAS
    + SHARED_EXPERTS
)

GLM4_MOE = Family(
    name="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    params=MODEL_ENDS + _LAYER + further_layers(_LAYER),
    fields=(
        Lacks("moe_router_score_function", "sigmoid"),
        Lacks("moe_router_enable_expert_bias", True),
        *SIZE_FIELDS,
        HEAD_DIM,
        *MIXTURE_FIELDS,
        ExpertGroups(),
        DenseFirst(default=1),
        scaling_factor(default=1.0),
        Pair("norm_topk_prob", "moe_router_pre_softmax", default=True, convert=(operator.not_, operator.not_)),
        further_tokens(default=1),
        Rope(partial=0.5),
        Pair("rms_norm_eps", "layernorm_epsilon", default=1e-5),
        Pair("attention_bias", "add_qkv_bias", default=False),
        Pair("use_qk_norm", "qk_layernorm", default=False),
    ),
    copies=COPIES,
)
