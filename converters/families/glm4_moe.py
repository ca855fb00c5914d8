"""GLM-4.5 and GLM-4.5-Air: partial rotary embedding, a sigmoid router as DeepSeek-V3's, a layer for further tokens."""

from __future__ import annotations

from ckptbridge.converters.families.attention import ATTENTION, HEAD_DIM, MODEL_ENDS, QK_NORM, QKV_BIAS, SIZE_FIELDS
from ckptbridge.converters.families.further_tokens import COPIES, further_layers, further_tokens
from ckptbridge.converters.families.mixture import MIXTURE, MIXTURE_FIELDS, SIGMOID_ROUTER, DenseFirst, scaling_factor
from ckptbridge.converters.fields import Pair
from ckptbridge.converters.mapping import Family
from ckptbridge.converters.rope_fields import Rope

_LAYER = ATTENTION + QKV_BIAS + QK_NORM + MIXTURE

GLM4_MOE = Family(
    name="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    params=MODEL_ENDS + _LAYER + further_layers(_LAYER),
    fields=(
        *SIZE_FIELDS,
        HEAD_DIM,
        *MIXTURE_FIELDS,
        *SIGMOID_ROUTER,
        DenseFirst(default=1),
        scaling_factor(default=1.0),
        further_tokens(default=1),
        Rope(partial=0.5),
        Pair("rms_norm_eps", "layernorm_epsilon", default=1e-5),
        Pair("attention_bias", "add_qkv_bias", default=False),
        Pair("use_qk_norm", "qk_layernorm", default=False),
    ),
    copies=COPIES,
)
