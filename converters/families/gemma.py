"""Gemma 1: norm weights around zero, embeddings times sqrt(hidden_size), GELU in the gated half, tied."""

from __future__ import annotations

import math
from typing import Any

from ckptbridge.converters.errors import NotSupportedError, told
from ckptbridge.converters.families.attention import ATTENTION, DENSE_MLP, MODEL_ENDS, NO_DROPOUT, SIZES
from ckptbridge.converters.fields import FieldRow, Lacks, Must, Pair
from ckptbridge.converters.mapping import Family
from ckptbridge.converters.rope_fields import Rope


def _square(multiplier: float) -> int:
    return round(multiplier**2)


def _gelu(name: Any) -> str:
    if name not in ("gelu_pytorch_tanh", "gelu"):  # the first files say gelu, and the class computes the other
        raise NotSupportedError(f"config.json: hidden_act is {told(name)}; only 'gelu_pytorch_tanh' is supported here")
    return "gelu_tanh"


def _gelu_name(activation: str) -> str:
    if activation != "gelu_tanh":
        raise NotSupportedError(f"activation_func is {activation!r}, which this Hugging Face class cannot express")
    return "gelu_pytorch_tanh"


GEMMA_FIELDS: tuple[FieldRow, ...] = (
    *SIZES,
    Pair("head_dim", "kv_channels", default=256),
    Pair("intermediate_size", "ffn_hidden_size"),
    Pair("rms_norm_eps", "layernorm_epsilon", default=1e-6),
    Pair("tie_word_embeddings", "share_embeddings_and_output_weights", default=True),
    Pair("initializer_range", "init_method_std", default=0.02),
    Pair("hidden_size", "embedding_multiplier", convert=(math.sqrt, _square)),
    NO_DROPOUT,
    Must("attention_bias", False),
    Must("use_bidirectional_attention", False, write=False),
    Lacks("layernorm_zero_centered_gamma", True),
)
"""What all of them share."""

GEMMA = Family(
    name="gemma",
    architecture="GemmaForCausalLM",
    params=MODEL_ENDS + ATTENTION + DENSE_MLP,
    fields=(
        *GEMMA_FIELDS,
        Pair("hidden_act", "activation_func", default="gelu_pytorch_tanh", convert=(_gelu, _gelu_name)),
        Must("hidden_activation", "gelu_pytorch_tanh", write=False),
        Rope(),
    ),
)
