"""The decoder against transformers' own classes: logits and gradients, and faults that must show in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ckptbridge.converters.model import decoder_tensors, open_model
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.trainer.decoder import Decoder
from ckptbridge.trainer.loading import check_values, empty_decoder, load_weights
from tests.conftest import TinyFolders
from tests.tiny import TINY, build_tiny, reference_logits, token_ids
from tests.trainer.packing import config_of, packed

LOGITS_TOLERANCE = 1e-5
"""Of fp32 logits of size 3: transformers itself is 5e-6 away from fp64 on these models."""
FAULT = 1e-2
"""Every planted fault moves a logit by at least this, a thousand tolerances."""

Weights = dict[str, Tensor]


def build(config: ModelConfig, weights: Weights, backend: str = "reference") -> Decoder:
    decoder = empty_decoder(config, backend, torch.float32, torch.device("cpu"))
    missing = decoder.load_state_dict(weights, strict=True)
    assert not missing.missing_keys
    return decoder


@torch.no_grad()
def logits_of(decoder: Decoder, tokens: Tensor) -> Tensor:
    return decoder.logits(decoder(tokens).hidden_BSH)


@pytest.mark.parametrize("name", TINY)
def test_logits_equal_transformers(name: str) -> None:
    model = build_tiny(name)
    config = config_of(model.config)
    decoder = build(config, packed(model.state_dict(), config))
    difference = (logits_of(decoder, token_ids()) - reference_logits(model, token_ids())).abs().max()
    assert difference <= LOGITS_TOLERANCE


@pytest.mark.parametrize("name", TINY)
def test_converters_give_the_same_decoder(name: str, tiny_folder: TinyFolders) -> None:
    """Two tables, one of the converters and one of plain loops, agree on config, names and every bit."""
    source = open_model(tiny_folder(name))
    decoder = empty_decoder(source.config, "reference", torch.float32, torch.device("cpu"))
    load_weights(decoder, decoder_tensors(source.tensors, source.config))
    check_values(decoder)
    expected = packed(build_tiny(name).state_dict(), source.config)
    found = decoder.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert (logits_of(decoder, token_ids()) - reference_logits(tiny_folder(name), token_ids())).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["llama_tied", "mixtral", "qwen2_moe", "qwen3_moe_unnormalised"])
def test_gradients_equal_transformers(name: str) -> None:
    model, tokens = build_tiny(name), token_ids()
    config = config_of(model.config)
    decoder = build(config, packed(model.state_dict(), config))
    logits = decoder.logits(decoder(tokens).hidden_BSH)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    model(tokens, labels=tokens).loss.backward()
    expected = packed({n: p.grad for n, p in model.named_parameters()}, config)
    for name_, parameter in decoder.named_parameters():
        difference = (parameter.grad - expected[name_]).abs().max() / expected[name_].abs().max()
        assert difference <= 1e-4, f"{name_}: {difference:.1e} of the largest gradient"


def _swap_gate_and_up(weights: Weights, config: ModelConfig) -> None:
    for name, weight in weights.items():
        if name.endswith("linear_fc1.weight"):
            weights[name] = weight.roll(weight.shape[-2] // 2, -2)


def _swap_experts(weights: Weights, config: ModelConfig) -> None:
    for name, weight in weights.items():
        if ".experts.experts." in name:
            weights[name] = weight[[1, 0, *range(2, len(weight))]]


def _swap_queries_and_keys(weights: Weights, config: ModelConfig) -> None:
    """The rows of each group's first query head change places with its key head's."""
    for name, weight in weights.items():
        if name.endswith("linear_qkv.weight"):
            heads = weight.unflatten(0, (config.num_query_groups, config.heads_per_group + 2, config.kv_channels))
            order = list(range(config.heads_per_group + 2))
            order[0], order[config.heads_per_group] = order[config.heads_per_group], 0
            weights[name] = heads[:, order].flatten(0, 2)


def _plain_qkv_order(weights: Weights, config: ModelConfig) -> None:
    """All queries, then all keys, then all values: what a converter without group interleaving writes."""
    for name, weight in weights.items():
        if name.endswith("linear_qkv.weight"):
            heads = weight.unflatten(0, (config.num_query_groups, config.heads_per_group + 2, config.kv_channels))
            q, k, v = heads.split((config.heads_per_group, 1, 1), 1)
            weights[name] = torch.cat([part.flatten(0, 2) for part in (q, k, v)])


def _transpose_projection(weights: Weights, config: ModelConfig) -> None:
    name = "decoder.layers.0.self_attention.linear_proj.weight"
    weights[name] = weights[name].t().contiguous()


@pytest.mark.parametrize(
    ("name", "plant"),
    [
        ("llama", _swap_gate_and_up),
        ("qwen2_moe", _swap_gate_and_up),
        ("mixtral", _swap_experts),
        ("llama", _swap_queries_and_keys),
        ("qwen3_moe", _plain_qkv_order),
        ("llama", _transpose_projection),
    ],
)
def test_planted_weight_faults_are_caught(name: str, plant: Callable[[Weights, ModelConfig], None]) -> None:
    model = build_tiny(name)
    config = config_of(model.config)
    weights = packed(model.state_dict(), config)
    plant(weights, config)
    difference = (logits_of(build(config, weights), token_ids()) - reference_logits(model, token_ids())).abs().max()
    assert difference > FAULT


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("llama", {"rotary_base": 20000.0}),
        ("llama_rope_scaled", {"rope_scaling": None}),
        ("mistral", {"window_size": None}),
        ("mistral", {"window_size": 8}),
        ("mixtral", {"moe_router_pre_softmax": True}),
        ("qwen3_moe_unnormalised", {"moe_router_pre_softmax": False}),
        ("qwen2_moe", {"moe_router_topk": 2}),
        ("qwen3", {"layernorm_epsilon": 1e-3}),
    ],
)
def test_planted_config_faults_are_caught(name: str, fault: dict[str, object]) -> None:
    model = build_tiny(name)
    config = config_of(model.config)
    decoder = build(replace(config, **fault), packed(model.state_dict(), config))
    difference = (logits_of(decoder, token_ids()) - reference_logits(model, token_ids())).abs().max()
    assert difference > 10 * LOGITS_TOLERANCE


@pytest.mark.parametrize("groups", [1, 4])
def test_one_query_group_and_one_query_head_a_group(groups: int) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(1)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=250, head_dim=8, num_key_value_heads=groups, **sizes)).eval()
    config = config_of(model.config)
    decoder = build(config, packed(model.state_dict(), config))
    assert (logits_of(decoder, token_ids()) - reference_logits(model, token_ids())).abs().max() <= 1e-6


def test_stages_are_those_of_transformers() -> None:
    model = build_tiny("qwen2_moe_sparse")
    config = config_of(model.config)
    stages: dict[str, Tensor] = {}
    with torch.no_grad():
        output = build(config, packed(model.state_dict(), config))(token_ids(), on_stage=stages.__setitem__)
        expected = model(token_ids(), output_hidden_states=True).hidden_states
    names = ["embedding", *(f"decoder.layers.{i}" for i in range(config.num_layers)), "decoder.final_layernorm"]
    assert list(stages) == names
    assert list(output.balance) == [i for i in range(config.num_layers) if config.is_moe_layer(i)]
    for name, theirs in zip([*names[:-2], names[-1]], expected, strict=True):  # theirs: the last one is normed
        assert (stages[name] - theirs).abs().max() <= 1e-5


def test_a_decoder_on_meta_costs_nothing() -> None:
    config = ModelConfig(
        num_layers=56,
        hidden_size=6144,
        ffn_hidden_size=16384,
        num_attention_heads=48,
        num_query_groups=8,
        kv_channels=128,
        vocab_size=32768,
        num_moe_experts=8,
        moe_ffn_hidden_size=16384,
    )
    with torch.device("meta"):
        decoder = Decoder(config)
    assert all(parameter.is_meta for parameter in decoder.parameters())
    assert sum(parameter.numel() for parameter in decoder.parameters()) == 140_630_071_296  # Mixtral 8x22B v0.3


def test_bf16_computes_close_to_fp32() -> None:
    model = build_tiny("llama")
    config = config_of(model.config)
    decoder = build(config, packed(model.state_dict(), config))
    exact = logits_of(decoder, token_ids())
    rounded = logits_of(decoder.to(torch.bfloat16), token_ids())
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() / exact.norm() < 0.05


def test_experts_without_tokens_get_zero_gradients() -> None:
    model = build_tiny("mixtral")
    config = config_of(model.config)
    decoder = build(config, packed(model.state_dict(), config))
    tokens = token_ids(1, 2)  # two tokens cannot meet four experts in every layer
    output = decoder(tokens)
    decoder.logits(output.hidden_BSH).sum().backward()
    idle = 0
    for layer, balance in output.balance.items():
        gradient = decoder.get_parameter(f"decoder.layers.{layer}.mlp.experts.experts.linear_fc1.weight").grad
        for expert, rows in enumerate(balance.choices_E.tolist()):
            assert bool(gradient[expert].any()) == bool(rows)
            idle += not rows
    assert idle
