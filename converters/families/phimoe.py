"""Phi-3.5-MoE: LayerNorm, biases in attention and behind the last layer, a router that weighs experts one by one.

transformers computes texts beyond `original_max_position_embeddings` with the factors for short ones, which the
authors' own code does not; this package's decoder follows the authors.
"""

from __future__ import annotations

from ckptbridge.converters.families.attention import (
    ATTENTION_BIAS,
    BIASED_ATTENTION,
    BLOCK_SPARSE_MOE,
    HEAD_DIM,
    MODEL_ENDS,
    MOE_FIELDS,
    ONE_WIDTH,
    SIZE_FIELDS,
    H,
    M,
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
    params=MODEL_ENDS + BIASED_ATTENTION + _BIASES + BLOCK_SPARSE_MOE,
    fields=(
        *SIZE_FIELDS,
        *MOE_FIELDS,
        HEAD_DIM,
        *ATTENTION_BIAS,
        Pair("lm_head_bias", "add_output_layer_bias", default=False),
        Pair("num_local_experts", "num_moe_experts"),
        *ONE_WIDTH,
        Pair("rms_norm_eps", "layernorm_epsilon", default=1e-5),
        Pair("sliding_window", "window_size", default=None),
        Pair("router_jitter_noise", "moe_router_jitter", default=0.01),
        Rope(default_theta=1e6, kinds=("default", "longrope"), original_beside=True, has_mscales=True),
        Must("tie_word_embeddings", False),
        Must("num_experts_per_tok", 2),
        Must("hidden_dropout", 0.0, write=False),
        Irrelevant(("input_jitter_noise",)),  # of training
        Lacks("normalization", "LayerNorm"),
        Lacks("moe_router_sparse_mixer", True),
    ),
)
