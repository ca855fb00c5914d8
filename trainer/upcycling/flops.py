"""What a token costs in a forward pass.

Two operations (a product and a sum) for each entry of a matrix that the token meets: all of attention, of MLPs, of
the router and of the shared expert, top-k of the routed experts, and the output matrix, tied or not; the embedding is
looked up. Beside it each head's scores and weighted values, two operations for each channel of each token it sees.
Norms, activations and the softmax are left out, as usual.
"""

from __future__ import annotations

from math import prod

from ckptbridge.converters.model import Model
from ckptbridge.converters.model_config import ModelConfig

_LAYERS = "decoder.layers."


def flops_a_token(model: Model, context: float) -> float:
    """Floating-point operations of a forward pass for a token that sees `context` tokens, itself among them."""
    config = model.config
    share = config.moe_router_topk / (config.num_moe_experts or 1)
    met = float(config.vocab_size * config.hidden_size)
    for name, tensor in model.tensors.items():
        if name.startswith(_LAYERS) and len(tensor.shape) == 2:
            met += prod(tensor.shape) * (share if ".experts.experts." in name else 1.0)
    return 2 * met + sum(_attention(config, layer, context) for layer in range(config.num_layers))


def _attention(config: ModelConfig, layer: int, context: float) -> float:
    values = config.v_head_dim if config.multi_latent_attention else None
    width = config.kv_channels + (config.kv_channels if values is None else values)
    if config.window_size is not None and config.has_window(layer):
        context = min(context, config.window_size)
    return 2 * config.num_attention_heads * width * context
