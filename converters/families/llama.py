"""Llama 2 and 3, and every model that is published as LlamaForCausalLM whatever its rotary scaling."""

from __future__ import annotations

from ckptbridge.converters.families.attention import (
    ATTENTION_BIAS,
    BIASED_ATTENTION,
    DENSE_MLP,
    HEAD_DIM,
    MLP_BIAS,
    MODEL_ENDS,
    SIZE_FIELDS,
)
from ckptbridge.converters.fields import Lacks, Must, Pair
from ckptbridge.converters.mapping import Family
from ckptbridge.converters.rope_fields import Rope

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    params=MODEL_ENDS + BIASED_ATTENTION + DENSE_MLP + MLP_BIAS,
    fields=(
        *SIZE_FIELDS,
        HEAD_DIM,
        Pair("intermediate_size", "ffn_hidden_size"),
        Pair("rms_norm_eps", "layernorm_epsilon", default=1e-6),
        Rope(),
        *ATTENTION_BIAS,
        Pair("mlp_bias", "add_mlp_bias", default=False),
        Must("rope_interleaved", False, write=False),
        Lacks("window_size", None),
        Lacks("qk_layernorm", False),
        Lacks("num_moe_experts", None),
    ),
    # Older files store the rotary frequencies, which follow from rope_theta.
    ignored=("model.layers.{layer}.self_attn.rotary_emb.inv_freq",),
)
