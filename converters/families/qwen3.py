"""Qwen3, dense: q and k are normalised per head, and a head's width is a field of its own."""

from __future__ import annotations

from ckptbridge.converters.families.attention import (
    ATTENTION_BIAS,
    BIASED_ATTENTION,
    DENSE_MLP,
    MODEL_ENDS,
    QK_NORM,
    SIZE_FIELDS,
)
from ckptbridge.converters.fields import Lacks, Pair
from ckptbridge.converters.mapping import Family
from ckptbridge.converters.rope_fields import Rope
from ckptbridge.converters.window_fields import LAST_LAYERS

QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    params=MODEL_ENDS + BIASED_ATTENTION + QK_NORM + DENSE_MLP,
    fields=(
        *SIZE_FIELDS,
        Pair("head_dim", "kv_channels", default=128),
        Pair("intermediate_size", "ffn_hidden_size"),
        Pair("rms_norm_eps", "layernorm_epsilon", default=1e-6),
        *ATTENTION_BIAS,
        LAST_LAYERS,
        Rope(),
        Lacks("qk_layernorm", True),
        Lacks("num_moe_experts", None),
    ),
)
