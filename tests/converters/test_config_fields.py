"""Fields of config.json: spellings that mean the same, and values that are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.fields import read_config
from ckptbridge.converters.registry import family_of
from tests.converters.published import PUBLISHED
from tests.converters.test_families import parse

Json = dict[str, Any]


def test_old_and_new_spellings_are_one_config() -> None:
    old = PUBLISHED["Llama-3.1-8B"]
    rope = {**old["rope_scaling"], "rope_theta": old["rope_theta"]}
    new = {k: v for k, v in old.items() if k not in ("rope_scaling", "rope_theta", "torch_dtype")}
    assert parse(new | {"rope_parameters": rope, "dtype": "bfloat16"}) == parse(old)
    legacy = old | {"rope_scaling": {("type" if k == "rope_type" else k): v for k, v in old["rope_scaling"].items()}}
    assert parse(legacy) == parse(old)
    qwen = PUBLISHED["Qwen3-30B-A3B"]
    respelled = {k: v for k, v in qwen.items() if k != "num_experts"} | {"num_local_experts": 128}
    assert parse(respelled) == parse(qwen)
    assert parse(old).rotary_base == 500000.0
    assert parse(old).rope_scaling is not None


REFUSED: list[tuple[str, Json, str]] = [
    ("Llama-3.1-8B", {"attention_bias": "yes"}, "add_qkv_bias"),
    ("Llama-3.1-8B", {"hidden_act": "gelu"}, "hidden_act"),
    ("Llama-3.1-8B", {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 4}}, "beta_fast"),
    ("Llama-3.1-8B", {"rope_scaling": {"type": "linear", "factor": "2"}}, "factor"),
    ("Llama-3.1-8B", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ("Llama-3.1-8B", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ("Llama-3.1-8B", {"rope_scaling": {"factor": 8.0}}, "factor"),
    ("Llama-3.1-8B", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ("Llama-3.1-8B", {"sliding_window": 4096}, "sliding_window"),
    ("Llama-3.1-8B", {"logit_scale": 0.5}, "logit_scale"),
    ("Llama-3.1-8B", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("Mistral-7B-v0.1", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("Mixtral-8x7B-v0.1", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
    ("Qwen2.5-7B", {"rope_scaling": {"type": "yarn"}}, "factor"),
    ("OLMoE-1B-7B-0924", {"clip_qkv": 8.0}, "clip_qkv"),
    ("Phi-3-mini-4k-instruct", {"rope_scaling": {"type": "yarn", "factor": 32.0}}, "yarn"),
    ("Phi-4-mini-instruct", {"full_attn_mod": 2}, "full_attn_mod"),
    ("MiniMax-M2", {"shared_intermediate_size": 1024}, "shared_intermediate_size"),
    ("Qwen2.5-7B", {"layer_types": ["full_attention", "sliding_attention"] * 14}, "sliding_attention"),
    ("Qwen3-30B-A3B", {"shared_expert_intermediate_size": 768}, "shared_expert_intermediate_size"),
    ("Qwen3-30B-A3B", {"use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types"),
    ("Qwen2.5-7B", {"use_sliding_window": True, "layer_types": ["linear_attention"] * 28}, "linear_attention"),
    ("Qwen2.5-7B", {"use_mrope": True}, "use_mrope"),
]


@pytest.mark.parametrize(("name", "change", "word"), REFUSED, ids=[f"{n}-{w}" for n, _, w in REFUSED])
def test_a_field_that_changes_the_computation_is_refused_by_name(name: str, change: Json, word: str) -> None:
    with pytest.raises(BadInputError) as refused:
        parse(PUBLISHED[name] | change)
    assert word in str(refused.value)
    assert "config.json" in str(refused.value)


IMPOSSIBLE: list[Json] = [
    {"num_attention_heads": 0},
    {"num_attention_heads": 30},
    {"num_key_value_heads": 0},
    {"num_hidden_layers": -1},
    {"num_hidden_layers": 32.0},
    {"num_hidden_layers": "32"},
    {"hidden_size": 4096.0},
    {"hidden_size": [4096]},
    {"vocab_size": None},
    {"vocab_size": 0},
    {"intermediate_size": 0},
    {"intermediate_size": "wide"},
    {"rope_theta": "many"},
    {"rope_scaling": "llama3"},
    {"rope_scaling": {"rope_type": ["llama3"]}},
    {"tie_word_embeddings": "false"},
    {"rms_norm_eps": "1e-5"},
    {"architectures": 5},
    {"architectures": ["Llama"]},
    {"architectures": None, "model_type": None},
]


@pytest.mark.parametrize("change", IMPOSSIBLE, ids=str)
def test_a_value_that_no_model_can_have_is_bad_input(change: Json) -> None:
    with pytest.raises(BadInputError):
        parse(PUBLISHED["Llama-3.1-8B"] | {"head_dim": None} | change)


def test_rope_of_long_texts_is_read_in_every_spelling() -> None:
    phi = PUBLISHED["Phi-4-mini-instruct"]
    inside = {**phi["rope_scaling"], "rope_theta": 10000.0, "original_max_position_embeddings": 4096}
    away = ("rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    new = {name: value for name, value in phi.items() if name not in away}
    new["rope_parameters"] = {**inside, "rope_type": "longrope", "partial_rotary_factor": 0.75}
    assert parse(new) == parse(phi)
    assert parse(phi | {"rope_scaling": phi["rope_scaling"] | {"type": "su"}}) == parse(phi)
    assert parse(phi | {"rope_scaling": phi["rope_scaling"] | {"factor": 32.0}}) == parse(phi)
    assert parse(phi | {"rope_scaling": phi["rope_scaling"] | {"factor": 2.0}}) != parse(phi)
    with pytest.raises(BadInputError, match="48 factors"):
        parse(phi | {"partial_rotary_factor": 1.0})
    moe = PUBLISHED["Phi-3.5-MoE-instruct"]
    assert parse(moe | {"architectures": ["PhiMoEForCausalLM"]}) == parse(moe)
    with pytest.raises(NotSupportedError, match="short_mscale"):
        parse(moe | {"rope_scaling": moe["rope_scaling"] | {"short_mscale": 1.0}})
    minimax = PUBLISHED["MiniMax-M2"]
    assert parse(minimax).rotary_dim == 64
    assert parse(minimax | {"rotary_dim": None, "partial_rotary_factor": 0.5}) == parse(minimax)
    qwen = PUBLISHED["Qwen2.5-7B"]
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32768}
    assert parse(qwen | {"rope_scaling": yarn | {"type": "yarn"}}) == parse(
        qwen | {"rope_theta": None, "rope_parameters": yarn | {"rope_type": "yarn", "rope_theta": 1e6}}
    )


def test_null_fields_that_nobody_knows_are_absent() -> None:
    config = PUBLISHED["Qwen3-8B"]
    assert parse(config | {"quantization_config": None, "some_new_field": None}) == parse(config)
    ignored = read_config(
        family_of(config, "x").fields, config | {"some_new_field": 3}, "config.json", ["some_new_field"]
    )
    assert ignored == parse(config)
