"""Nemotron-4 and Minitron: squared ReLU without a gated half, LayerNorm1P with biases, half of a head turns."""

from __future__ import annotations

from ckptbridge.converters.families.attention import ATTENTION, HEAD_DIM, MODEL_ENDS, NO_DROPOUT, SIZES, H, M
from ckptbridge.converters.fields import Lacks, Must, Pair
from ckptbridge.converters.layout import COLUMN, COPY, ROW
from ckptbridge.converters.mapping import Family, Param
from ckptbridge.converters.rope_fields import Rope

_NORM_BIASES = (
    Param("decoder.final_layernorm.bias", "model.norm.bias", COPY),
    Param(f"{M}.self_attention.linear_qkv.layer_norm_bias", f"{H}.input_layernorm.bias", COPY),
    Param(f"{M}.mlp.linear_fc1.layer_norm_bias", f"{H}.post_attention_layernorm.bias", COPY),
)
_MLP = (
    Param(f"{M}.mlp.linear_fc1.layer_norm_weight", f"{H}.post_attention_layernorm.weight", COPY),
    Param(f"{M}.mlp.linear_fc1.weight", f"{H}.mlp.up_proj.weight", COLUMN),
    Param(f"{M}.mlp.linear_fc2.weight", f"{H}.mlp.down_proj.weight", ROW),
)

NEMOTRON = Family(
    name="nemotron",
    architecture="NemotronForCausalLM",
    params=MODEL_ENDS + ATTENTION + _NORM_BIASES + _MLP,
    fields=(
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
    ),
)
