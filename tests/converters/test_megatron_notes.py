"""What is said of a model at conversion: what Megatron-LM cannot be told of it, and where its flags are."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from ckptbridge.converters.mcore.flags import COPIED, FLAGS, TOLD_BY_ANOTHER, model_flags
from ckptbridge.converters.mcore.notes import NO_FLAG, megatron_notes, unsaid
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.rope_scaling import (
    LinearRopeScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    RopeScaling,
    YarnRopeScaling,
)

PLAIN = ModelConfig(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=8,
    vocab_size=250,
)
MIXTURE = replace(PLAIN, num_moe_experts=8, moe_ffn_hidden_size=40)
GROUPED = replace(MIXTURE, moe_router_topk=4, moe_router_num_groups=4, moe_router_group_topk=2)
LATENT = replace(
    PLAIN,
    multi_latent_attention=True,
    num_query_groups=8,
    kv_channels=20,
    q_lora_rank=28,
    kv_lora_rank=24,
    qk_head_dim=12,
    qk_pos_emb_head_dim=8,
    v_head_dim=20,
)
LONG = LongRopeScaling(short_factor=(1.0,) * 4, long_factor=(2.0,) * 4, original_max_position_embeddings=16)
YARN = YarnRopeScaling(factor=40.0, original_max_position_embeddings=4096)


def _id(value: object) -> str:
    return "-".join(value) if isinstance(value, dict) else type(value).__name__


def test_every_field_has_a_flag_or_a_reason_for_none() -> None:
    for field in fields(ModelConfig):
        assert sum(field.name in told for told in (FLAGS, TOLD_BY_ANOTHER, NO_FLAG)) == 1, field.name
    assert FLAGS.keys() >= set(TOLD_BY_ANOTHER.values())


def test_what_is_said_of_every_model_is_copied_but_for_few() -> None:
    told = {flag[0] for flag in model_flags(PLAIN, copied=False)}
    assert {flag[0] for flag in model_flags(PLAIN, copied=True)} == told - COPIED
    assert told - COPIED == {"--norm-epsilon", "--attention-softmax-in-fp32"}


def test_nothing_is_said_of_what_megatron_is_told() -> None:
    assert megatron_notes(PLAIN) == []
    assert unsaid(GROUPED) == unsaid(MIXTURE) == unsaid(LATENT) == {}


@pytest.mark.parametrize(
    "changes",
    [
        {"layernorm_epsilon": 1e-6},
        {"qk_layernorm": True},
        {"window_size": 7},
        {"rope_scaling": Llama3RopeScaling(factor=8.0)},
        {"layernorm_zero_centered_gamma": True},
        {"softmax_scale": 0.2},
        {"embedding_multiplier": 8.0},
    ],
    ids=_id,
)
def test_flags_that_are_not_copied_are_pointed_to(changes: dict[str, Any]) -> None:
    (note,) = megatron_notes(replace(PLAIN, **changes))
    assert "ckptbridge launch megatron" in note


@pytest.mark.parametrize(
    ("model", "changes", "words"),
    [
        (PLAIN, {"local_rotary_base": 1e4}, ("local_rotary_base = 10000.0",)),
        (PLAIN, {"post_layernorm": True, "pre_layernorm": False}, ("post_layernorm = True", "pre_layernorm = False")),
        (PLAIN, {"activation_func": "gelu_tanh"}, ("activation_func = 'gelu_tanh'", "silu or quick_gelu")),
        (PLAIN, {"gated_linear_unit": False, "activation_func": "silu"}, ("activation_func = 'silu'", "squared_relu")),
        (PLAIN, {"add_proj_bias": True, "add_qkv_bias": True}, ("add_mlp_bias = False", "none of them")),
        (MIXTURE, {"add_router_bias": True}, ("add_mlp_bias = False", "router")),
        (PLAIN, {"add_proj_bias": True, "add_mlp_bias": True}, ("add_qkv_bias = False",)),
        (MIXTURE, {"moe_router_topk": 1}, ("moe_router_topk = 1", "refuses")),
        (GROUPED, {"moe_router_group_max": True}, ("moe_router_group_max = True", "not as its best one")),
        (GROUPED, {"moe_router_topk": 6}, ("moe_router_group_topk = 2", "best 3 experts")),
        (LATENT, {"q_lora_rank": None}, ("q_lora_rank = None", "once more")),
        (MIXTURE, {"moe_router_sparse_mixer": True}, ("moe_router_sparse_mixer",)),
    ],
    ids=_id,
)
def test_what_megatron_cannot_be_told_is_named(
    model: ModelConfig, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    notes = " ".join(megatron_notes(replace(model, **changes)))
    assert "another model" in notes
    for word in words:
        assert word in notes


ROPES: list[tuple[ModelConfig, RopeScaling, str]] = [
    (PLAIN, Llama3RopeScaling(factor=8.0), ""),
    (PLAIN, Llama3RopeScaling(factor=32.0), "whatever --rope-scaling-factor says"),
    (PLAIN, Llama3RopeScaling(factor=8.0, original_max_position_embeddings=16), "whatever"),
    (PLAIN, LinearRopeScaling(factor=4.0), ""),
    (PLAIN, LinearRopeScaling(factor=2.5), "whole number"),
    (PLAIN, LONG, "not known"),
    (PLAIN, replace(YARN, beta_fast=1.0, truncate=False), ""),
    (PLAIN, replace(YARN, attention_factor=1.0), "attention_factor"),
    (LATENT, YARN, ""),
    (LATENT, replace(YARN, beta_fast=1.0), "beta_fast is 32.0"),
    (LATENT, replace(YARN, original_max_position_embeddings=16), "original_max_position_embeddings is 4096"),
    (LATENT, Llama3RopeScaling(factor=8.0), "YaRN only"),
    (replace(PLAIN, mtp_num_layers=1), YARN, "refused"),
]


@pytest.mark.parametrize(("model", "scaling", "why"), ROPES, ids=_id)
def test_rope_scaling_that_megatron_computes_otherwise_is_named(
    model: ModelConfig, scaling: RopeScaling, why: str
) -> None:
    told = unsaid(replace(model, rope_scaling=scaling))
    assert told.keys() == ({"rope_scaling"} if why else set())
    assert why in told.get("rope_scaling", "")
