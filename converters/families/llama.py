"""Llama 2 and 3, and every model that is published as LlamaForCausalLM with plain or llama3 rope."""

from __future__ import annotations

from ckptbridge.converters.families.attention import ATTENTION, DENSE_MLP, HEAD_DIM, MODEL_ENDS, SIZE_FIELDS
from ckptbridge.converters.fields import Lacks, Must, Pair
from ckptbridge.converters.mapping import Family
from ckptbridge.converters.rope_fields import Rope

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    params=MODEL_ENDS + ATTENTION + DENSE_MLP,
    fields=(
        *SIZE_FIELDS,
        HEAD_DIM,
        Pair("intermediate_size", "ffn_hidden_size"),
        Pair("rms_norm_eps", "layernorm_epsilon", default=1e-6),
        Rope(),
        Must("attention_bias", False),
        Must("mlp_bias", False),
        Must("rope_interleaved", False, write=False),
        Lacks("window_size", None),
        Lacks("add_qkv_bias", False),
        Lacks("qk_layernorm", False),
        Lacks("num_moe_experts", None),
    ),
    # Older files store the rotary frequencies, which follow from rope_theta.
    ignored=("model.layers.{layer}.self_attn.rotary_emb.inv_freq",),
)
