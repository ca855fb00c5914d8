"""FLOPs of a step: those of the slices that trainers are compared on, and what the log says of them."""

from __future__ import annotations

import math

import pytest
import torch

from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.trainer.decoder import Decoder
from ckptbridge.trainer.flops import step_flops
from ckptbridge.trainer.throughput import Throughput, peak_rate

SLICES = {
    # layers, hidden, heads, groups, ffn, experts, top-k, shared, sequence
    "llama3-e8t2": (2, 4096, 32, 8, 14336, 8, 2, 0, 8192),
    "mixtral-8x22b": (1, 6144, 48, 8, 16384, 8, 2, 0, 4096),
    "qwen2-57b-a14b": (2, 3584, 28, 4, 2560, 64, 8, 20480, 4096),
    "qwen3-30b-a3b": (4, 2048, 32, 4, 768, 128, 8, 0, 4096),
}
"""Layers of published models, with heads of 128 channels and 32,768 words; a step is 16,384 tokens."""
TOKENS, WORDS, CHANNELS = 16384, 32768, 128


def slice_config(name: str, **fields: object) -> ModelConfig:
    layers, hidden, heads, groups, ffn, experts, topk, shared, _ = SLICES[name]
    values = {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": CHANNELS,
        "vocab_size": WORDS,
        "num_moe_experts": experts,
        "moe_ffn_hidden_size": ffn,
        "moe_router_topk": topk,
        "moe_shared_expert_intermediate_size": shared or None,
        "qk_layernorm": name.startswith("qwen3"),
    }
    return ModelConfig(**(values | fields))


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Decoder(config).named_parameters()}


def counted_by_hand(name: str) -> float:
    """The formula of the comparison's own script."""
    layers, hidden, heads, groups, ffn, experts, topk, shared, length = SLICES[name]
    attention = 2 * hidden * CHANNELS * (2 * heads + 2 * groups) + 2 * length * CHANNELS * heads
    mixture = 2 * (topk * 3 * hidden * ffn + hidden * experts + 3 * hidden * shared)
    return 3.0 * TOKENS * (layers * (attention + mixture) + 2 * hidden * WORDS)


@pytest.mark.parametrize("name", SLICES)
def test_flops_of_a_step_are_those_of_the_comparison(name: str) -> None:
    config, length = slice_config(name), SLICES[name][-1]
    found = step_flops(shapes_of(config), config, length, TOKENS)
    assert math.isclose(found, counted_by_hand(name), rel_tol=1e-12)
    # What the count must see: experts that are not chosen cost nothing, the head and causal order count.
    other = slice_config(name, moe_router_topk=1)
    assert not math.isclose(step_flops(shapes_of(other), other, length, TOKENS), found, rel_tol=1e-3)
    assert not math.isclose(step_flops(shapes_of(config), config, 2 * length, TOKENS), found, rel_tol=1e-3)


@pytest.mark.parametrize("window", [1, 3, 8, 20])
def test_a_window_costs_the_area_under_it(window: int) -> None:
    """Of the square of queries and keys: the half below the diagonal, less the triangle that the window cuts off."""
    length, config = 8, slice_config("qwen3-30b-a3b")
    shapes, narrow = shapes_of(config), slice_config("qwen3-30b-a3b", window_size=window)
    cut_off = max(length - window, 0) ** 2 / 2
    saved = step_flops(shapes, config, length, length) - step_flops(shapes, narrow, length, length)
    assert math.isclose(saved, 3 * 4 * (2 * 32 * 2 * CHANNELS) * cut_off, rel_tol=1e-6, abs_tol=1)


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("Tesla T4", None),
        ("NVIDIA H2000", None),
    ],
)
def test_devices_are_known_by_whole_words(name: str, rate: float | None) -> None:
    assert peak_rate(name) == rate


def test_the_log_tells_flops_where_there_is_a_gpu() -> None:
    kwargs = {"tokens": 1000, "flops": 4e14}
    gpu = Throughput(device=torch.device("cuda"), peak=1e15, **kwargs).record(0.5)
    assert gpu == {"tokens_per_s": 2000.0, "step_ms": 500.0, "tflops": 800.0, "mfu": 0.8}
    unknown = Throughput(device=torch.device("cuda"), peak=None, **kwargs).record(0.5)
    assert unknown == {"tokens_per_s": 2000.0, "step_ms": 500.0, "tflops": 800.0}
    cpu = Throughput(device=torch.device("cpu"), peak=None, **kwargs).record(0.5)
    assert cpu == {"tokens_per_s": 2000.0, "step_ms": 500.0}
