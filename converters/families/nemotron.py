"""Nemotron-4 and Minitron: squared ReLU without a gated half, LayerNorm1P with biases, half of a head turns."""

from __future__ import annotations

from ckptbridge.converters.families.attention import (
    ATTENTION,
    DOWN,
    HEAD_DIM,
    MLP_NORM,
    MODEL_ENDS,
    NO_DROPOUT,
    SIZES,
    H,
    M,
    is_dense,
)
from ckptbridge.converters.fields import FieldRow, Lacks, Must, Pair
from ckptbridge.converters.layout import COLUMN, COPY
from ckptbridge.converters.mapping import Family, Param
from ckptbridge.converters.rope_fields import Rope

NORM_BIASES = (
    Param("decoder.final_layernorm.bias", "model.norm.bias", COPY),
    Param(f"{M}.self_attention.linear_qkv.layer_norm_bias", f"{H}.input_layernorm.bias", COPY),
)
"""But for that of the norm before the MLP, which stands where the MLP is."""
DENSE_MLP = (
    Param(f"{M}.mlp.linear_fc1.layer_norm_bias", f"{H}.post_attention_layernorm.bias", COPY, when=is_dense),
    *MLP_NORM,
    Param(f"{M}.mlp.linear_fc1.weight", f"{H}.mlp.up_proj.weight", COLUMN, when=is_dense),
    *DOWN,
)
NEMOTRON_FIELDS: tuple[FieldRow, ...] = (
    *SIZES,
    HEAD_DIM,
    Pair("intermediate_size", "ffn_hidden_size"),
    Pair("norm_eps", "layernorm_epsilon", default=1e-5),
    Pair("tie_word_embeddings", "share_embeddings_and_output_weights", default=False),
    Pair("initializer_range", "init_method_std", default=0.0134),
    Rope(partial=0.5),
    NO_DROPOUT,
    Must("hidden_act", "relu2"),
    Must("attention_bias", False),
    Must("mlp_bias", False),
    Lacks("normalization", "LayerNorm"),
    Lacks("layernorm_zero_centered_gamma", True),
    Lacks("gated_linear_unit", False),
    Lacks("activation_func", "squared_relu"),
)
"""With or without experts."""

NEMOTRON = Family(
    name="nemotron",
    architecture="NemotronForCausalLM",
    params=MODEL_ENDS + ATTENTION + NORM_BIASES + DENSE_MLP,
    fields=NEMOTRON_FIELDS,
)
