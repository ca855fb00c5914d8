"""Granite 3, dense and with experts: Llama with multipliers of embeddings, scores, the residual stream and logits."""

from __future__ import annotations

from ckptbridge.converters.families.attention import (
    ATTENTION_BIAS,
    BIASED_ATTENTION,
    DENSE_MLP,
    HEAD_DIM,
    MODEL_ENDS,
    MOE_FIELDS,
    SIZES,
    H,
    M,
)
from ckptbridge.converters.fields import FieldRow, Irrelevant, Must, Pair, same
from ckptbridge.converters.layout import COPY, GATED_WHOLE, ROW
from ckptbridge.converters.mapping import Family, Param
from ckptbridge.converters.rope_fields import Rope

_FIELDS: tuple[FieldRow, ...] = (
    *SIZES,
    Pair("tie_word_embeddings", "share_embeddings_and_output_weights", default=False),
    Pair("initializer_range", "init_method_std", default=0.02),
    Must("hidden_act", "silu"),
    Irrelevant(("attention_dropout",)),  # the published files name that of their training, 0.1
    *ATTENTION_BIAS,
    HEAD_DIM,
    Pair("intermediate_size", "ffn_hidden_size"),
    Pair("rms_norm_eps", "layernorm_epsilon", default=1e-6),
    Pair("attention_multiplier", "softmax_scale", default=1.0),
    Pair("logits_scaling", "logits_divisor", default=1.0),
    same("embedding_multiplier", 1.0),
    same("residual_multiplier", 1.0),
    Rope(),
)
_EXPERT, _BLOCK = f"{M}.mlp.experts.experts.{{expert}}", f"{H}.block_sparse_moe"

GRANITE = Family(
    name="granite",
    architecture="GraniteForCausalLM",
    params=MODEL_ENDS + BIASED_ATTENTION + DENSE_MLP,
    fields=(*_FIELDS, Must("mlp_bias", False)),
)

GRANITE_MOE = Family(
    name="granitemoe",
    architecture="GraniteMoeForCausalLM",
    params=(
        *(MODEL_ENDS + BIASED_ATTENTION),
        Param(f"{M}.pre_mlp_layernorm.weight", f"{H}.post_attention_layernorm.weight", COPY),
        Param(f"{M}.mlp.router.weight", f"{_BLOCK}.router.layer.weight", COPY),
        Param(f"{_EXPERT}.linear_fc1.weight", f"{_BLOCK}.input_linear.weight", GATED_WHOLE),
        Param(f"{_EXPERT}.linear_fc2.weight", f"{_BLOCK}.output_linear.weight", ROW),
    ),
    fields=(
        *_FIELDS,
        *MOE_FIELDS,
        Pair("num_local_experts", "num_moe_experts", default=8),
        Pair("intermediate_size", "moe_ffn_hidden_size"),
    ),
)
