"""Phi-3.5-MoE: LayerNorm, biases in attention and behind the last layer, a router that weighs experts one by one.

transformers computes texts beyond `original_max_position_embeddings` with the factors for short ones, which the
authors' own code does not; this package's decoder follows the authors.
"""

from __future__ import annotations

from ckptbridge.converters.families.attention import (
    ATTENTION,
    ATTENTION_BIAS,
    HEAD_DIM,
    MODEL_ENDS,
    MOE_FIELDS,
    NO_DROPOUT,
    PROJECTION_BIAS,
    QKV_BIAS,
    SIZES,
    H,
    M,
    moe_mlp,
)
from ckptbridge.converters.fields import Irrelevant, Lacks, Must, Pair
from ckptbridge.converters.layout import VOCAB
from ckptbridge.converters.mapping import Family, Param
from ckptbridge.converters.rope_fields import Rope

_BIASES = (
    Param(f"{M}.self_attention.linear_qkv.layer_norm_bias", f"{H}.input_layernorm.bias"),
    Param(f"{M}.pre_mlp_layernorm.bias", f"{H}.post_attention_layernorm.bias"),
    Param("decoder.final_layernorm.bias", "model.norm.bias"),
    Param("output_layer.bias", "lm_head.bias", VOCAB, when=lambda config, layer: config.add_output_layer_bias),
)

PHIMOE = Family(
    name="phimoe",
    architecture="PhimoeForCausalLM",
    spellings=("PhiMoEForCausalLM",),
    params=MODEL_ENDS
    + ATTENTION
    + QKV_BIAS
    + PROJECTION_BIAS
    + _BIASES
    + moe_mlp("block_sparse_moe", gate_proj="w1", up_proj="w3", down_proj="w2"),
    fields=(
        *SIZES,
        *MOE_FIELDS,
        HEAD_DIM,
        *ATTENTION_BIAS,
        Pair("lm_head_bias", "add_output_layer_bias", default=False),
        Pair("num_local_experts", "num_moe_experts"),
        Pair("intermediate_size", "moe_ffn_hidden_size"),
        Pair("intermediate_size", "ffn_hidden_size"),
        Pair("rms_norm_eps", "layernorm_epsilon", default=1e-5),
        Pair("initializer_range", "init_method_std", default=0.02),
        Pair("sliding_window", "window_size", default=None),
        Pair("router_jitter_noise", "moe_router_jitter", default=0.01),
        Rope(default_theta=1e6, kinds=("default", "longrope"), original_beside=True, has_mscales=True),
        Must("hidden_act", "silu"),
        NO_DROPOUT,
        Must("tie_word_embeddings", False),
        Must("num_experts_per_tok", 2),
        Must("hidden_dropout", 0.0, write=False),
        Irrelevant(("input_jitter_noise",)),  # of training
        Lacks("normalization", "LayerNorm"),
        Lacks("moe_router_sparse_mixer", True),
    ),
)
