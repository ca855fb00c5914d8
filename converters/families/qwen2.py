"""Qwen2 and Qwen2.5, dense: Llama with biases on q, k and v."""

from __future__ import annotations

from ckptbridge.converters.families.attention import (
    ATTENTION,
    DENSE_MLP,
    HEAD_DIM,
    MODEL_ENDS,
    QKV_BIAS,
    SIZE_FIELDS,
)
from ckptbridge.converters.fields import Lacks, Must, Pair
from ckptbridge.converters.mapping import Family
from ckptbridge.converters.rope_fields import Rope
from ckptbridge.converters.window_fields import LAST_LAYERS

QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    params=MODEL_ENDS + ATTENTION + QKV_BIAS + DENSE_MLP,
    fields=(
        *SIZE_FIELDS,
        HEAD_DIM,
        Pair("intermediate_size", "ffn_hidden_size"),
        Pair("rms_norm_eps", "layernorm_epsilon", default=1e-6),
        LAST_LAYERS,
        Must("use_mrope", False, write=False),
        Rope(),
        Lacks("add_qkv_bias", True),
        Lacks("qk_layernorm", False),
        Lacks("num_moe_experts", None),
    ),
)
