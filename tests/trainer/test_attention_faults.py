"""Faults planted in models whose queries, keys, positions or experts differ from Llama's: each one moves a logit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ckptbridge.converters.model import decoder_tensors, open_model
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.rope_scaling import LinearRopeScaling, LongRopeScaling, YarnRopeScaling
from ckptbridge.trainer.decoder import Decoder
from ckptbridge.trainer.loading import empty_decoder, load_weights
from ckptbridge.trainer.rope import attention_factor, inverse_frequencies
from tests.conftest import TinyFolders
from tests.tiny import reference_logits, token_ids

FAULT = 1e-3
"""Every planted fault moves a logit by at least this, a hundred times the tolerance of the families' oracle."""

Weights = dict[str, Tensor]


def built(config: ModelConfig, weights: Weights) -> Decoder:
    decoder = empty_decoder(config, "reference", torch.float32, torch.device("cpu"))
    decoder.load_state_dict(weights, strict=True)
    return decoder


def opened(name: str, tiny_folder: TinyFolders) -> tuple[ModelConfig, Weights]:
    """A tiny model's config, and its weights as the decoder holds them."""
    source = open_model(tiny_folder(name))
    decoder = empty_decoder(source.config, "reference", torch.float32, torch.device("cpu"))
    load_weights(decoder, decoder_tensors(source.tensors, source.config))
    return source.config, {key: value.clone() for key, value in decoder.state_dict().items()}


@torch.no_grad()
def moved(name: str, config: ModelConfig, weights: Weights, tiny_folder: TinyFolders) -> float:
    """By how much a logit is off, at most."""
    decoder = built(config, weights)
    found = decoder.logits(decoder(token_ids()).hidden_BSH)
    return (found - reference_logits(tiny_folder(name), token_ids())).abs().max().item()


def _each(ending: str, change: Callable[[Tensor, ModelConfig], Tensor]) -> Callable[[Weights, ModelConfig], None]:
    def plant(weights: Weights, config: ModelConfig) -> None:
        names = [name for name in weights if name.endswith(ending)]
        assert names
        for name in names:
            weights[name] = change(weights[name], config).contiguous()

    return plant


def _as_hugging_face_has_it(weight: Tensor, config: ModelConfig) -> Tensor:
    """All queries, all keys, all values: a fused projection that was copied as it is."""
    heads = weight.unflatten(0, (config.num_query_groups, config.heads_per_group + 2, config.kv_channels))
    return torch.cat([part.flatten(0, 2) for part in heads.split((config.heads_per_group, 1, 1), 1)])


def _halves_swapped(weight: Tensor, config: ModelConfig) -> Tensor:
    return weight.roll(weight.shape[-2] // 2, -2)


def _first_two_swapped(weight: Tensor, config: ModelConfig) -> Tensor:
    return weight[[1, 0, *range(2, len(weight))]]


def _turned(weight: Tensor, config: ModelConfig) -> Tensor:
    return weight.T if weight.shape[0] == weight.shape[1] else weight.T.reshape(weight.shape)


def _gone(weight: Tensor, config: ModelConfig) -> Tensor:
    return torch.zeros_like(weight)


WEIGHT_FAULTS = {
    "phi3: q, k and v as they were": ("phi3", _each("linear_qkv.weight", _as_hugging_face_has_it)),
    "phi3: gate and up": ("phi3", _each("mlp.linear_fc1.weight", _halves_swapped)),
    "phi3: a transposed projection": ("phi3", _each("layers.0.self_attention.linear_proj.weight", _turned)),
    "olmo2: gate and up": ("olmo2", _each("mlp.linear_fc1.weight", _halves_swapped)),
    "olmo2: another order of query norms": ("olmo2", _each("q_layernorm.weight", lambda w, c: w.roll(c.kv_channels))),
    "olmo2: another order of key norms": ("olmo2", _each("k_layernorm.weight", lambda w, c: w.roll(c.kv_channels))),
    "olmo2: no bias behind attention": ("olmo2_biased", _each("linear_proj.bias", _gone)),
    "llama: no bias of fc1": ("llama_biased", _each("mlp.linear_fc1.bias", _gone)),
    "llama: gate and up of that bias": ("llama_biased", _each("mlp.linear_fc1.bias", lambda w, c: w.roll(len(w) // 2))),
    "qwen3: no bias behind attention": ("qwen3_biased", _each("linear_proj.bias", _gone)),
    "olmoe: two experts": ("olmoe", _each("experts.experts.linear_fc2.weight", _first_two_swapped)),
    "olmoe: the router's order": ("olmoe", _each("router.weight", _first_two_swapped)),
    "minimax_m2: two experts": ("minimax_m2", _each("experts.experts.linear_fc1.weight", _first_two_swapped)),
    "minimax_m2: no expert biases": ("minimax_m2", _each("expert_bias", _gone)),
    "minimax_m2: expert biases in another order": ("minimax_m2", _each("expert_bias", _first_two_swapped)),
    "phimoe: the router's order": ("phimoe", _each("router.weight", _first_two_swapped)),
    "phimoe: gate and up": ("phimoe", _each("experts.experts.linear_fc1.weight", _halves_swapped)),
    "phimoe: no bias of the last layer": ("phimoe", _each("output_layer.bias", _gone)),
    "phimoe: no bias of a norm": ("phimoe", _each("pre_mlp_layernorm.bias", _gone)),
}


@pytest.mark.parametrize("fault", WEIGHT_FAULTS)
def test_a_fault_in_the_weights_shows(fault: str, tiny_folder: TinyFolders) -> None:
    name, plant = WEIGHT_FAULTS[fault]
    config, weights = opened(name, tiny_folder)
    plant(weights, config)
    assert moved(name, config, weights, tiny_folder) > FAULT


CONFIG_FAULTS: list[tuple[str, dict[str, object]]] = [
    ("phi3", {"window_size": 8}),
    ("phi3", {"rotary_base": 20000.0}),
    ("phi3_long", {"rotary_percent": 1.0, "rope_scaling": None}),
    ("phi3_long", {"max_position_embeddings": 16}),
    (
        "phi3_long",
        {
            "rope_scaling": LongRopeScaling(
                short_factor=(1.0, 1.2), long_factor=(1.0, 1.2), original_max_position_embeddings=16
            )
        },
    ),
    ("llama_biased", {"rope_scaling": LinearRopeScaling(factor=2.0)}),
    ("qwen2_windowed", {"window_layers": (1, 1, 0, 0)}),
    ("qwen2_windowed", {"rope_scaling": None}),
    ("qwen2_moe_windowed", {"window_layers": None}),
    ("olmo2", {"rotary_base": 20000.0}),
    ("olmoe", {"moe_router_pre_softmax": False}),
    ("minimax_m2", {"rotary_percent": 1.0}),
    ("minimax_m2", {"moe_router_score_function": "softmax"}),
    ("phimoe", {"moe_router_jitter": 0.01}),
    ("phimoe", {"moe_router_sparse_mixer": False}),
]


@pytest.mark.parametrize(("name", "fault"), CONFIG_FAULTS, ids=[f"{n}-{next(iter(f))}" for n, f in CONFIG_FAULTS])
def test_a_fault_in_the_config_shows(name: str, fault: dict[str, object], tiny_folder: TinyFolders) -> None:
    config, weights = opened(name, tiny_folder)
    assert moved(name, replace(config, **fault), weights, tiny_folder) > FAULT


@pytest.mark.parametrize("length", [16, 17])
def test_long_texts_turn_by_other_factors(length: int, tiny_folder: TinyFolders) -> None:
    """LongRoPE's two sets meet at the length of the first training, as they do in transformers."""
    config, weights = opened("phi3_long", tiny_folder)
    decoder, tokens = built(config, weights), token_ids(length=length)
    with torch.no_grad():
        found = decoder.logits(decoder(tokens).hidden_BSH)
    assert (found - reference_logits(tiny_folder("phi3_long"), tokens)).abs().max() <= 1e-5


def _hf_frequencies(kind: str, rope: dict[str, object], head_dim: int) -> tuple[Tensor, float]:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_type": kind, "rope_theta": 10000.0, **rope}
    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=131072, rope_parameters=parameters)
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))


@pytest.mark.parametrize(
    "rope",
    [
        {"factor": 4.0},
        {"factor": 32.0, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
        {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7},
        {"factor": 40.0, "attention_factor": 1.5},
    ],
    ids=str,
)
def test_yarn_is_that_of_transformers(rope: dict[str, float], tiny_folder: TinyFolders) -> None:
    scaling = YarnRopeScaling(original_max_position_embeddings=4096, **rope)  # type: ignore[arg-type]
    llama = open_model(tiny_folder("llama")).config
    config = replace(llama, kv_channels=64, rope_scaling=scaling, rotary_base=10000.0)
    expected, factor = _hf_frequencies("yarn", {"original_max_position_embeddings": 4096, **rope}, 64)
    torch.testing.assert_close(inverse_frequencies(config, 8), expected, rtol=1e-6, atol=0)
    assert attention_factor(config) == pytest.approx(factor, rel=1e-12)
