"""Faults planted in converted models of families with other norms, activations and multipliers: each moves a logit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ckptbridge.converters.model import decoder_tensors, open_model
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.trainer.loading import empty_decoder, load_weights
from tests.conftest import TinyFolders
from tests.tiny import reference_logits, token_ids

FAULT = 1e-3
"""Every planted fault moves a logit by at least this, a hundred times the tolerance of the families' oracle."""

Weights = dict[str, Tensor]
Plant = Callable[[Weights, ModelConfig], None]


@torch.no_grad()
def difference(name: str, tiny_folder: TinyFolders, plant: Plant | None = None, **fields: Any) -> float:
    """How far the decoder's logits are from transformers' with a fault in its weights or in its config."""
    source = open_model(tiny_folder(name))
    decoder = empty_decoder(replace(source.config, **fields), "reference", torch.float32, torch.device("cpu"))
    load_weights(decoder, decoder_tensors(source.tensors, source.config))
    if plant:
        weights = decoder.state_dict()
        plant(weights, source.config)
        decoder.load_state_dict(weights)
    logits = decoder.logits(decoder(token_ids()).hidden_BSH)
    return float((logits - reference_logits(tiny_folder(name), token_ids())).abs().max())


def exchange(first: str, second: str) -> Plant:
    """Two parameters of every layer change places."""

    def plant(weights: Weights, config: ModelConfig) -> None:
        for layer in range(config.num_layers):
            a, b = (f"decoder.layers.{layer}.{name}" for name in (first, second))
            weights[a], weights[b] = weights[b], weights[a]

    return plant


def turn(name: str, dim: int, parts: int) -> Plant:
    """The parts of a parameter along one dim change places in every layer, the last one to the front."""

    def plant(weights: Weights, config: ModelConfig) -> None:
        for layer in range(config.num_layers):
            whole = weights[f"decoder.layers.{layer}.{name}"]
            weights[f"decoder.layers.{layer}.{name}"] = whole.roll(whole.shape[dim] // parts, dim)

    return plant


def queries_first(weights: Weights, config: ModelConfig) -> None:
    """All queries, then all keys, then all values, not group by group."""
    heads = (config.num_query_groups, config.heads_per_group + 2, config.kv_channels)
    for name in [name for name in weights if name.endswith("linear_qkv.weight")]:
        parts = weights[name].unflatten(0, heads).split((config.heads_per_group, 1, 1), 1)
        weights[name] = torch.cat([part.flatten(0, 2) for part in parts])


def transposed(weights: Weights, config: ModelConfig) -> None:
    name = "decoder.layers.0.self_attention.linear_proj.weight"
    weights[name] = weights[name].t().contiguous()


_GATED = turn("mlp.linear_fc1.weight", 0, 2)
_POST_NORMS = exchange("self_attention.linear_proj.post_layernorm.weight", "mlp.linear_fc2.post_layernorm.weight")
_PRE_AND_POST = exchange("mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc2.post_layernorm.weight")


@pytest.mark.parametrize(
    ("name", "plant"),
    [
        ("nemotron", queries_first),
        ("nemotron", exchange("self_attention.linear_qkv.layer_norm_bias", "mlp.linear_fc1.layer_norm_bias")),
        ("nemotron", turn("mlp.linear_fc1.weight", 0, 2)),
        ("gemma", queries_first),
        ("gemma", _GATED),
        ("gemma2", _GATED),
        ("gemma2", _POST_NORMS),
        ("gemma2", _PRE_AND_POST),
        ("gemma3", exchange("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight")),
        ("gemma3", _POST_NORMS),
        ("granite", _GATED),
        ("granite", transposed),
        ("granite_moe", turn("mlp.experts.experts.linear_fc1.weight", 1, 2)),
        ("granite_moe", turn("mlp.experts.experts.linear_fc2.weight", 0, 4)),
        ("granite_moe", turn("mlp.router.weight", 0, 4)),
    ],
)
def test_planted_weight_faults_are_caught(name: str, plant: Plant, tiny_folder: TinyFolders) -> None:
    assert difference(name, tiny_folder, plant) > FAULT


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("nemotron", {"rotary_percent": 1.0}),
        ("nemotron", {"rotary_base": 20000.0}),
        ("nemotron", {"layernorm_zero_centered_gamma": False}),
        ("nemotron", {"layernorm_epsilon": 1e-4}),
        ("nemotron", {"activation_func": "gelu"}),
        ("gemma", {"embedding_multiplier": 1.0}),
        ("gemma", {"layernorm_zero_centered_gamma": False}),
        ("gemma", {"activation_func": "silu"}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"softmax_scale": None}),
        ("gemma2", {"window_layers": (0, 1, 0, 1)}),
        ("gemma3", {"local_rotary_base": None}),
        ("gemma3", {"rope_scaling": None}),
        ("gemma3", {"window_layers": None}),
        ("granite", {"residual_multiplier": 1.0}),
        ("granite", {"embedding_multiplier": 1.0}),
        ("granite", {"logits_divisor": 1.0}),
        ("granite", {"softmax_scale": None}),
        ("granite_moe", {"moe_router_pre_softmax": True}),
        ("granite_moe", {"residual_multiplier": 1.0}),
    ],
)
def test_planted_config_faults_are_caught(name: str, fault: dict[str, Any], tiny_folder: TinyFolders) -> None:
    assert difference(name, tiny_folder, **fault) > FAULT
