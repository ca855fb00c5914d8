"""What each part of a step costs at least: its products at the rate of one matrix product, its bytes at that of a copy.

The rates are measured on the device at hand. Bytes are counted as this package's kernels read and write them once;
products are counted without the traffic of their operands.

Shapes: T tokens a step, H hidden_size, N heads, E experts, K top-k, R = T*K routed rows, F ffn width, O rows of fc1.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.trainer.activations import fc1_rows
from ckptbridge.trainer.flops import attention_flops


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Operations and bytes a second that the device reached, bytes read and written counted together."""

    matrix: float
    copy: float


@dataclass(frozen=True, slots=True)
class Cost:
    """Operations and bytes of one part of a step, forward and backward."""

    flops: float = 0.0
    nbytes: float = 0.0

    def floor_ms(self, rates: Rates) -> float:
        """Milliseconds that the part takes at least."""
        return 1e3 * max(self.flops / rates.matrix, self.nbytes / rates.copy)

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.nbytes + other.nbytes)


def costs(
    config: ModelConfig, *, length: int, tokens: int, element: int, parameters: int, moment: int
) -> dict[str, Cost]:
    """By part, for steps of `tokens` tokens in sequences of `length`.

    `element` and `moment` are the bytes of a weight and of one of Adam's moments.
    """
    found: dict[str, Cost] = {}

    def add(part: str, cost: Cost) -> None:
        found[part] = found.get(part, Cost()) + cost

    T, H = tokens, config.hidden_size
    for layer in range(config.num_layers):
        window = min(config.window_size or length, length) if config.has_window(layer) else length
        add("attention", Cost(3 * T * attention_flops(config, window - window * window / (2 * length))))
        add("projections", Cost(6 * T * _projection_entries(config)))
        # Forward: what is added, the stream, the sum and its norm; backward: two gradients in, the stream, one out.
        add("norms", Cost(nbytes=2 * 8 * T * H * element))
        if not config.is_moe_layer(layer):
            add("dense products", _mlp_products(config, T, config.ffn_hidden_size))
            add("activation", _activation(config, T, config.ffn_hidden_size, element))
            continue
        R, E, F = T * config.moe_router_topk, config.num_moe_experts or 0, config.moe_ffn_hidden_size or 0
        add("router", Cost(6 * T * H * E, 4 * 4 * T * E))
        # x and the gradient of the output are gathered, x again in the backward pass; outputs and dx are summed.
        add("dispatch", Cost(nbytes=3 * (T + R) * H * element))
        add("expert products", _mlp_products(config, R, F))
        add("activation", _activation(config, R, F, element))
        add("combine", Cost(nbytes=2 * (T + R) * H * element))
        if shared := config.moe_shared_expert_intermediate_size:
            add("dense products", _mlp_products(config, T, shared))
            add("activation", _activation(config, T, shared, element))
    add("norms", Cost(nbytes=8 * T * H * element))
    add("head and loss", Cost(6 * T * H * config.vocab_size))
    # The gradient is read twice (its norm, then Adam); moments and main weights are read and written, weights written.
    main = 8 if element != 4 else 0
    add("optimizer", Cost(nbytes=parameters * (2 * 4 + 2 * 2 * moment + main + (element if main else 2 * element))))
    return found


def _projection_entries(config: ModelConfig) -> float:
    H, N = config.hidden_size, config.num_attention_heads
    if not config.multi_latent_attention:
        return H * config.kv_channels * (2 * N + 2 * config.num_query_groups)
    latent, turned, value = config.kv_lora_rank or 0, config.qk_pos_emb_head_dim or 0, config.v_head_dim or 0
    keys = H * (latent + turned) + latent * N * ((config.qk_head_dim or 0) + value)
    rank, queries = config.q_lora_rank, N * config.kv_channels
    return keys + N * value * H + (H * queries if rank is None else rank * (H + queries))


def _mlp_products(config: ModelConfig, rows: int, ffn: int) -> Cost:
    return Cost(6 * rows * config.hidden_size * (fc1_rows(config, ffn) + ffn))


def _activation(config: ModelConfig, rows: int, ffn: int, element: int) -> Cost:
    """Forward: rows of O in, of F out; backward: O and F in, and out again."""
    return Cost(nbytes=3 * rows * (fc1_rows(config, ffn) + ffn) * element)


def measured_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Time a square matrix product and a copy, each a few times, in a fraction of a second; about 1 GB at most."""
    size, nbytes = (8192, 256 << 20) if device.type == "cuda" else (512, 16 << 20)
    # Random numbers: products of constants switch fewer transistors, and the clock stays higher than in earnest.
    matrices = [torch.randn(size, size, dtype=dtype, device=device) for _ in range(2)]
    out = torch.empty_like(matrices[0])
    matrix = 2 * size**3 / _seconds(partial(torch.mm, *matrices, out=out), device)
    source, target = (torch.ones(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
    copy = 2 * nbytes / _seconds(partial(target.copy_, source), device)
    del matrices, out, source, target
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return Rates(matrix=matrix, copy=copy)


def _seconds(call: Callable[[], object], device: torch.device, times: int = 10) -> float:
    """Of one call, a mean behind three that warm up."""
    for _ in range(3):
        call()
    _wait(device)
    started = time.perf_counter()
    for _ in range(times):
        call()
    _wait(device)
    return (time.perf_counter() - started) / times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
