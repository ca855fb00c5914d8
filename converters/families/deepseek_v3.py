"""DeepSeek-V3, V3.1 and R1, and Kimi-K2, which is published as the same class: latent attention, a sigmoid router."""

from __future__ import annotations

from ckptbridge.converters.families.attention import MODEL_ENDS, SIZE_FIELDS
from ckptbridge.converters.families.further_tokens import COPIES, further_layers, further_tokens
from ckptbridge.converters.families.latent import LATENT_ATTENTION, LATENT_FIELDS
from ckptbridge.converters.families.mixture import MIXTURE, MIXTURE_FIELDS, SIGMOID_ROUTER, DenseFirst, scaling_factor
from ckptbridge.converters.fields import Must
from ckptbridge.converters.mapping import Family

_LAYER = LATENT_ATTENTION + MIXTURE

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    params=MODEL_ENDS + _LAYER + further_layers(_LAYER),
    fields=(
        *SIZE_FIELDS,
        *LATENT_FIELDS,
        *MIXTURE_FIELDS,
        *SIGMOID_ROUTER,
        DenseFirst(default=3),
        scaling_factor(default=2.5),
        further_tokens(default=1),
        Must("rope_interleave", True),
        Must("moe_layer_freq", 1, write=False),
        Must("scoring_func", "sigmoid"),
        Must("topk_method", "noaux_tc"),
    ),
    copies=COPIES,
)
