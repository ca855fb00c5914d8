"""Mistral 7B and its successors: Llama with a sliding window over every layer."""

from __future__ import annotations

from ckptbridge.converters.families.attention import ATTENTION, DENSE_MLP, HEAD_DIM, MODEL_ENDS, SIZE_FIELDS
from ckptbridge.converters.fields import Lacks, Pair
from ckptbridge.converters.mapping import Family
from ckptbridge.converters.rope_fields import Rope

MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    params=MODEL_ENDS + ATTENTION + DENSE_MLP,
    fields=(
        *SIZE_FIELDS,
        HEAD_DIM,
        Pair("intermediate_size", "ffn_hidden_size"),
        Pair("rms_norm_eps", "layernorm_epsilon", default=1e-6),
        Pair("sliding_window", "window_size", default=4096, null_means_none=True),
        Rope(),
        Lacks("add_qkv_bias", False),
        Lacks("qk_layernorm", False),
        Lacks("num_moe_experts", None),
    ),
)
