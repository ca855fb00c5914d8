"""What a token costs in a forward pass, and what a step of training costs.

Two operations (a product and a sum) for each entry of a matrix that the token meets: all of attention, of MLPs, of
the router and of the shared expert, top-k of the routed experts, and the output matrix, tied or not; the embedding is
looked up. Beside it each head's scores and weighted values, two operations for each channel of each token it sees.
Norms, activations and the softmax are left out, as usual; so is whatever is computed a second time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from ckptbridge.converters.model_config import ModelConfig

_LAYERS = "decoder.layers."


def step_flops(shapes: Mapping[str, Sequence[int]], config: ModelConfig, length: int, tokens: int) -> float:
    """Model FLOPs of forward and backward pass over `tokens` tokens in sequences of `length`, as Megatron counts them.

    The backward pass is two forward passes, and a token of a causal sequence sees half of it on average. With a window
    of w tokens the average over the sequence is w - w^2 / (2 length), which meets the half where the window ends.
    `shapes` are those of the parameters by name, experts one by one or stacked.
    """
    window = min(config.window_size or length, length)
    return 3 * tokens * flops_a_token(shapes, config, length / 2, window - window * window / (2 * length))


def flops_a_token(
    shapes: Mapping[str, Sequence[int]], config: ModelConfig, context: float, windowed: float | None = None
) -> float:
    """Floating-point operations of a forward pass for a token that sees `context` tokens, itself among them.

    In layers with a window it sees `windowed` tokens: by default the window's, where the context is longer.
    """
    if windowed is None:
        windowed = min(context, config.window_size or context)
    attention = sum(windowed if config.has_window(layer) else context for layer in range(config.num_layers))
    return 2 * entries_met(shapes, config) + attention_flops(config, attention)


def entries_met(shapes: Mapping[str, Sequence[int]], config: ModelConfig) -> float:
    """Entries of all matrices that one token is multiplied with."""
    share = config.moe_router_topk / (config.num_moe_experts or 1)
    met = float(config.vocab_size * config.hidden_size)
    for name, shape in shapes.items():
        # Stacked experts have matrices of three dims, and biases of two.
        if name.startswith(_LAYERS) and name.endswith("weight") and len(shape) > 1:
            met += prod(shape) * (share if ".experts.experts." in name else 1.0)
    return met


def attention_flops(config: ModelConfig, context: float) -> float:
    """Operations of scores and weighted values of one layer for a token that sees `context` tokens."""
    values = config.v_head_dim if config.multi_latent_attention else None
    width = config.kv_channels + (config.kv_channels if values is None else values)
    return 2 * config.num_attention_heads * width * context
