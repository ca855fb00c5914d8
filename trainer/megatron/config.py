"""What the real megatron-core must be told to compute a model: from ModelConfig, as JSON can carry it."""

from __future__ import annotations

from typing import Any

from ckptbridge.converters.errors import NotSupportedError
from ckptbridge.converters.mcore.torch_dist_writer import VOCAB_MULTIPLE
from ckptbridge.converters.model_config import Llama3RopeScaling, ModelConfig


def transformer_config(config: ModelConfig, *, tp: int = 1) -> dict[str, dict[str, Any]]:
    """Keyword arguments of TransformerConfig ("transformer") and of GPTModel ("gpt").

    `tp` pads the vocabulary as Megatron-LM does. Raises NotSupportedError for a model that megatron-core computes
    in another way, whatever it is told.
    """
    transformer: dict[str, Any] = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_query_groups,
        "kv_channels": config.kv_channels,
        "layernorm_epsilon": config.layernorm_epsilon,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "add_qkv_bias": config.add_qkv_bias,
        "qk_layernorm": config.qk_layernorm,
        "window_size": [config.window_size - 1, 0] if config.window_size else None,
    }
    if config.num_moe_experts is not None:
        transformer |= _mixture(config)
    multiple = VOCAB_MULTIPLE * tp
    gpt: dict[str, Any] = {
        "vocab_size": -(-config.vocab_size // multiple) * multiple,
        "max_sequence_length": config.max_position_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": config.rotary_base,
        "share_embeddings_and_output_weights": config.share_embeddings_and_output_weights,
    }
    if config.rope_scaling is not None:
        gpt |= _rope_scaling(config.rope_scaling)
    return {"transformer": transformer, "gpt": gpt}


def _mixture(config: ModelConfig) -> dict[str, Any]:
    freq = config.moe_layer_freq
    if config.moe_router_topk == 1 and not config.moe_router_pre_softmax:
        raise NotSupportedError(
            "moe_router_topk is 1 and the chosen weights sum to one, so that every token's only weight is 1: "
            "megatron-core refuses to build such a model. Verify it with --engine reference"
        )
    return {
        "num_moe_experts": config.num_moe_experts,
        "moe_router_topk": config.moe_router_topk,
        "moe_router_pre_softmax": config.moe_router_pre_softmax,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",  # a loss of training
        "moe_ffn_hidden_size": config.moe_ffn_hidden_size,
        "moe_layer_freq": list(freq) if isinstance(freq, tuple) else freq,
        "moe_shared_expert_intermediate_size": config.moe_shared_expert_intermediate_size,
        "moe_shared_expert_gate": config.moe_shared_expert_gate,
        "moe_token_dispatcher_type": "alltoall",
    }


def _rope_scaling(scaling: Llama3RopeScaling) -> dict[str, Any]:
    """GPTModel takes the factor only; the rest is fixed in its code to what Llama 3.1 published."""
    fixed = Llama3RopeScaling(factor=scaling.factor)
    if scaling != fixed:
        raise NotSupportedError(
            f"megatron-core computes rope scaling as {fixed} and cannot be told {scaling}. "
            "Verify this model with --engine reference"
        )
    return {"rope_scaling": True, "rope_scaling_factor": scaling.factor}
