"""Rows and fields that several families share. A family is a concatenation of these, never an override."""

from __future__ import annotations

import operator
from typing import Any

from ckptbridge.converters.fields import FieldRow, Must, Pair, SparseLayers, same
from ckptbridge.converters.layout import COPY, GATED, QKV, ROW, VOCAB
from ckptbridge.converters.mapping import Param
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.rope_fields import Rope

M, H = "decoder.layers.{layer}", "model.layers.{layer}"

MODEL_ENDS = (
    Param("embedding.word_embeddings.weight", "model.embed_tokens.weight", VOCAB),
    Param("decoder.final_layernorm.weight", "model.norm.weight", COPY),
    Param(
        "output_layer.weight",
        "lm_head.weight",
        VOCAB,
        when=lambda config, layer: not config.share_embeddings_and_output_weights,
    ),
)

INPUT_NORM = (Param(f"{M}.self_attention.linear_qkv.layer_norm_weight", f"{H}.input_layernorm.weight", COPY),)
QKV_APART = (
    Param(
        f"{M}.self_attention.linear_qkv.weight",
        (f"{H}.self_attn.q_proj.weight", f"{H}.self_attn.k_proj.weight", f"{H}.self_attn.v_proj.weight"),
        QKV,
    ),
)
PROJECTION = (Param(f"{M}.self_attention.linear_proj.weight", f"{H}.self_attn.o_proj.weight", ROW),)
ATTENTION = INPUT_NORM + QKV_APART + PROJECTION

QKV_BIAS = (
    Param(
        f"{M}.self_attention.linear_qkv.bias",
        (f"{H}.self_attn.q_proj.bias", f"{H}.self_attn.k_proj.bias", f"{H}.self_attn.v_proj.bias"),
        QKV,
        when=lambda config, layer: config.add_qkv_bias,
    ),
)

PROJECTION_BIAS = (
    Param(
        f"{M}.self_attention.linear_proj.bias",
        f"{H}.self_attn.o_proj.bias",
        COPY,
        when=lambda config, layer: config.add_proj_bias,
    ),
)

BIASED_ATTENTION = ATTENTION + QKV_BIAS + PROJECTION_BIAS

QK_NORM = tuple(
    Param(
        f"{M}.self_attention.{which}_layernorm.weight",
        f"{H}.self_attn.{which}_norm.weight",
        COPY,
        when=lambda config, layer: config.qk_layernorm,
    )
    for which in "qk"
)


def is_dense(config: ModelConfig, layer: int) -> bool:
    return not config.is_moe_layer(layer)


MLP_NORM = (
    Param(f"{M}.mlp.linear_fc1.layer_norm_weight", f"{H}.post_attention_layernorm.weight", COPY, when=is_dense),
)
GATE_UP_APART = (
    Param(
        f"{M}.mlp.linear_fc1.weight",
        (f"{H}.mlp.gate_proj.weight", f"{H}.mlp.up_proj.weight"),
        GATED,
        when=is_dense,
    ),
)
DOWN = (Param(f"{M}.mlp.linear_fc2.weight", f"{H}.mlp.down_proj.weight", ROW, when=is_dense),)
DENSE_MLP = MLP_NORM + GATE_UP_APART + DOWN

MLP_BIAS = (
    Param(
        f"{M}.mlp.linear_fc1.bias",
        (f"{H}.mlp.gate_proj.bias", f"{H}.mlp.up_proj.bias"),
        GATED,
        when=lambda config, layer: config.add_mlp_bias,
    ),
    Param(
        f"{M}.mlp.linear_fc2.bias",
        f"{H}.mlp.down_proj.bias",
        COPY,
        when=lambda config, layer: config.add_mlp_bias,
    ),
)
"""Of models without experts."""


def _moe_mlp(block: str, gate_proj: str, up_proj: str, down_proj: str) -> tuple[Param, ...]:
    """Router and experts under `block`, e.g. mlp or block_sparse_moe, with the family's names of the three matrices."""
    expert = f"{H}.{block}.experts.{{expert}}"
    mcore = f"{M}.mlp.experts.experts.{{expert}}"
    return (
        Param(
            f"{M}.pre_mlp_layernorm.weight",
            f"{H}.post_attention_layernorm.weight",
            COPY,
            when=ModelConfig.is_moe_layer,
        ),
        Param(f"{M}.mlp.router.weight", f"{H}.{block}.gate.weight", COPY, when=ModelConfig.is_moe_layer),
        Param(
            f"{mcore}.linear_fc1.weight",
            (f"{expert}.{gate_proj}.weight", f"{expert}.{up_proj}.weight"),
            GATED,
            when=ModelConfig.is_moe_layer,
        ),
        Param(f"{mcore}.linear_fc2.weight", f"{expert}.{down_proj}.weight", ROW, when=ModelConfig.is_moe_layer),
    )


MOE_MLP = _moe_mlp("mlp", gate_proj="gate_proj", up_proj="up_proj", down_proj="down_proj")
BLOCK_SPARSE_MOE = _moe_mlp("block_sparse_moe", gate_proj="w1", up_proj="w3", down_proj="w2")

SHARED_EXPERT = (
    Param(
        f"{M}.mlp.shared_experts.linear_fc1.weight",
        (f"{H}.mlp.shared_expert.gate_proj.weight", f"{H}.mlp.shared_expert.up_proj.weight"),
        GATED,
        when=ModelConfig.is_moe_layer,
    ),
    Param(
        f"{M}.mlp.shared_experts.linear_fc2.weight",
        f"{H}.mlp.shared_expert.down_proj.weight",
        ROW,
        when=ModelConfig.is_moe_layer,
    ),
    Param(
        f"{M}.mlp.shared_experts.gate_weight",
        f"{H}.mlp.shared_expert_gate.weight",
        COPY,
        when=ModelConfig.is_moe_layer,
    ),
)


def _hidden_over_heads(hf: dict[str, Any]) -> int:
    return hf["hidden_size"] // hf["num_attention_heads"]


def _all_heads(hf: dict[str, Any]) -> int:
    return hf["num_attention_heads"]


SIZES: tuple[FieldRow, ...] = (
    Pair("num_hidden_layers", "num_layers"),
    same("hidden_size"),
    same("num_attention_heads"),
    Pair("num_key_value_heads", "num_query_groups", default=_all_heads),
    same("vocab_size"),
    same("max_position_embeddings", 4096),
)
NO_DROPOUT = Must("attention_dropout", 0.0)

SIZE_FIELDS: tuple[FieldRow, ...] = (
    *SIZES,
    Pair("tie_word_embeddings", "share_embeddings_and_output_weights", default=False),
    Pair("initializer_range", "init_method_std", default=0.02),
    Must("hidden_act", "silu"),
    NO_DROPOUT,
)

HEAD_DIM = Pair("head_dim", "kv_channels", default=_hidden_over_heads)

MOE_FIELDS: tuple[FieldRow, ...] = (
    Pair("num_experts_per_tok", "moe_router_topk"),
    Pair("router_aux_loss_coef", "moe_aux_loss_coeff", default=0.001),
)

NORM_TOPK_PROB = Pair("norm_topk_prob", "moe_router_pre_softmax", default=False, convert=(operator.not_, operator.not_))

ONE_WIDTH: tuple[FieldRow, ...] = (
    Pair("intermediate_size", "moe_ffn_hidden_size"),
    Pair("intermediate_size", "ffn_hidden_size"),
)
"""Of models without dense layers. Megatron takes the experts' width where no other is named: here either is right."""

QWEN_MOE_FIELDS: tuple[FieldRow, ...] = (
    *SIZE_FIELDS,
    *MOE_FIELDS,
    HEAD_DIM,
    NORM_TOPK_PROB,
    # transformers 5 writes num_local_experts, the published files num_experts; its classes read both.
    Pair("num_experts", "num_moe_experts", spellings=("num_local_experts",)),
    Pair("intermediate_size", "ffn_hidden_size"),
    Pair("moe_intermediate_size", "moe_ffn_hidden_size"),
    Pair("rms_norm_eps", "layernorm_epsilon", default=1e-6),
    SparseLayers(),
    Rope(),
)

ATTENTION_BIAS: tuple[FieldRow, ...] = (
    Pair("attention_bias", "add_qkv_bias", default=False),
    Pair("attention_bias", "add_proj_bias", default=False),
)
"""One field for the biases of all four projections."""
