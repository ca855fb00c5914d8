"""What the real megatron-core must be told to compute a model: from ModelConfig, as JSON can carry it."""

from __future__ import annotations

from typing import Any

from ckptbridge.converters.errors import NotSupportedError
from ckptbridge.converters.mcore.notes import groups_are_ranked_alike
from ckptbridge.converters.mcore.torch_dist_writer import VOCAB_MULTIPLE
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.rope_scaling import LinearRopeScaling, Llama3RopeScaling, RopeScaling, YarnRopeScaling
from ckptbridge.trainer.computed import ALWAYS, refuse_beyond

MEGATRON_COMPUTES = ALWAYS | {
    *("normalization", "layernorm_zero_centered_gamma", "gated_linear_unit", "activation_func", "glu_linear_offset"),
    *("activation_func_clamp_value", "rotary_percent", "softmax_scale", "embedding_multiplier", "logits_divisor"),
    *("window_layers", "add_proj_bias", "add_mlp_bias"),
    *("add_router_bias", "softmax_type"),
    *("multi_latent_attention", "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
    *("moe_router_score_function", "moe_router_enable_expert_bias", "moe_router_topk_scaling_factor"),
    *("moe_router_num_groups", "moe_router_group_topk", "moe_router_group_max", "mtp_num_layers"),
}
"""The fields of ModelConfig that are told to megatron-core below."""


def transformer_config(config: ModelConfig, *, tp: int = 1) -> dict[str, dict[str, Any]]:
    """Keyword arguments of TransformerConfig ("transformer") and of GPTModel ("gpt").

    `tp` pads the vocabulary as Megatron-LM does. Raises NotSupportedError for a model that megatron-core computes
    in another way, whatever it is told.
    """
    refuse_beyond(config, MEGATRON_COMPUTES, "megatron-core's GPTModel, as it is built here,")
    transformer: dict[str, Any] = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_query_groups,
        "kv_channels": config.kv_channels,
        "layernorm_epsilon": config.layernorm_epsilon,
        "softmax_scale": config.softmax_scale,
        "softmax_type": config.softmax_type,
        "normalization": config.normalization,
        "layernorm_zero_centered_gamma": config.layernorm_zero_centered_gamma,
        "gated_linear_unit": config.gated_linear_unit,
        "activation_func": config.activation_func,
        "activation_func_clamp_value": config.activation_func_clamp_value,
        "glu_linear_offset": config.glu_linear_offset,
        "add_bias_linear": _has_biases(config),
        "add_qkv_bias": config.add_qkv_bias,
        "qk_layernorm": config.qk_layernorm,
        "window_size": [config.window_size - 1, 0] if config.window_size else None,
        "window_attn_skip_freq": list(config.window_layers) if config.window_layers else None,
    }
    if config.embedding_multiplier != 1 or config.logits_divisor != 1:
        transformer |= _multipliers(config)
    if config.num_moe_experts is not None:
        transformer |= _mixture(config)
    multiple = VOCAB_MULTIPLE * tp
    gpt: dict[str, Any] = {
        "vocab_size": -(-config.vocab_size // multiple) * multiple,
        "max_sequence_length": config.max_position_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": config.rotary_base,
        "rotary_percent": config.rotary_percent,
        "share_embeddings_and_output_weights": config.share_embeddings_and_output_weights,
    }
    if config.mtp_num_layers:
        transformer["mtp_num_layers"] = config.mtp_num_layers
    if config.multi_latent_attention:
        transformer |= _latent_attention(config)
    elif isinstance(config.rope_scaling, YarnRopeScaling):
        transformer |= _yarn(config.rope_scaling)
        gpt["position_embedding_type"] = "yarn"
    elif config.rope_scaling is not None:
        gpt |= _rope_scaling(config.rope_scaling)
    return {"transformer": transformer, "gpt": gpt}


def _has_biases(config: ModelConfig) -> bool:
    """One switch is for the biases of all linear layers, in attention and behind it, and of routers."""
    has_router = config.num_moe_experts is not None
    biases = (config.add_proj_bias, config.add_mlp_bias, *((config.add_router_bias,) if has_router else ()))
    if len(set(biases)) > 1:
        raise NotSupportedError(
            f"add_proj_bias is {config.add_proj_bias}, add_mlp_bias {config.add_mlp_bias} and add_router_bias "
            f"{config.add_router_bias}: megatron-core's GPTModel has all or none. Verify with --engine reference"
        )
    return config.add_mlp_bias


def _multipliers(config: ModelConfig) -> dict[str, Any]:
    """megatron-core has them as parts of its muP, of which nothing else changes what a model of this width computes."""
    scale = config.kv_channels**-0.5 if config.softmax_scale is None else config.softmax_scale
    return {
        "use_mup": True,
        "mup_base_hidden_size": config.hidden_size,
        "mup_embedding_mult": config.embedding_multiplier,
        "mup_output_mult": 1 / config.logits_divisor,
        "softmax_scale": scale,
    }


def _latent_attention(config: ModelConfig) -> dict[str, Any]:
    """Latent attention turns its heads itself, and so is told of it."""
    if config.q_lora_rank is None:
        raise NotSupportedError(
            "queries come from the hidden state, not from a latent: megatron-core 0.19 norms what linear_q_proj gets "
            "where it norms latents (qk_layernorm). Verify this model with --engine reference"
        )
    told: dict[str, Any] = {
        "multi_latent_attention": True,
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_head_dim": config.qk_head_dim,
        "qk_pos_emb_head_dim": config.qk_pos_emb_head_dim,
        "v_head_dim": config.v_head_dim,
        "rotary_base": config.rotary_base,
    }
    scaling = config.rope_scaling
    if scaling is None:
        return told | {"rope_type": "rope"}
    if (
        not isinstance(scaling, YarnRopeScaling)
        or scaling.attention_factor is not None
        or not scaling.truncate
        or (scaling.mscale_all_dim and not scaling.mscale)
    ):
        raise NotSupportedError(f"megatron-core cannot be told {scaling}. Verify this model with --engine reference")
    return told | {
        "rope_type": "yarn",
        "rotary_scaling_factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        # Without mscale_all_dim transformers reads no mscale either.
        "mscale": scaling.mscale if scaling.mscale_all_dim else 1.0,
        "mscale_all_dim": scaling.mscale_all_dim or 0.0,
    }


def _routing(config: ModelConfig) -> dict[str, Any]:
    """How experts are chosen, where it is not by the softmax of all alone."""
    is_sigmoid = config.moe_router_score_function == "sigmoid"
    if is_sigmoid and config.moe_router_pre_softmax:
        raise NotSupportedError(
            "the chosen sigmoids are weights as they are: megatron-core always divides them by their sum. "
            "Verify this model with --engine reference"
        )
    if not groups_are_ranked_alike(config):
        raise NotSupportedError(
            f"a group is ranked by its best {1 if config.moe_router_group_max else 2} experts, in megatron-core by its "
            f"best {config.moe_router_topk // (config.moe_router_group_topk or 1)}. Verify with --engine reference"
        )
    return {
        "moe_router_score_function": config.moe_router_score_function,
        "moe_router_enable_expert_bias": config.moe_router_enable_expert_bias,
        "moe_router_topk_scaling_factor": config.moe_router_topk_scaling_factor,
        "moe_router_num_groups": config.moe_router_num_groups,
        "moe_router_group_topk": config.moe_router_group_topk,
    }


def _mixture(config: ModelConfig) -> dict[str, Any]:
    freq = config.moe_layer_freq
    if config.moe_router_topk == 1 and not config.moe_router_pre_softmax:
        is_softmax = config.moe_router_score_function == "softmax"
        does = "refuses to build such a model" if is_softmax else "weighs it by its sigmoid as it is"
        raise NotSupportedError(
            "moe_router_topk is 1 and the chosen weights sum to one, so that every token's only weight is 1: "
            f"megatron-core {does}. Verify it with --engine reference"
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
        **_routing(config),
    }


def _yarn(scaling: YarnRopeScaling) -> dict[str, Any]:
    """TransformerConfig has no fields for it: Megatron-LM sets attributes of these names."""
    if scaling.attention_factor is not None:
        raise NotSupportedError(f"megatron-core cannot be told {scaling}. Verify this model with --engine reference")
    return {
        "yarn_rotary_scaling_factor": scaling.factor,
        "yarn_original_max_position_embeddings": scaling.original_max_position_embeddings,
        "yarn_beta_fast": scaling.beta_fast,
        "yarn_beta_slow": scaling.beta_slow,
        "yarn_mscale": scaling.mscale or 1.0,
        "yarn_mscale_all_dim": scaling.mscale_all_dim or 0.0,
        "yarn_correction_range_round_to_int": scaling.truncate,
    }


def _rope_scaling(scaling: RopeScaling) -> dict[str, Any]:
    """Of Llama 3's GPTModel takes the factor only; the rest is fixed in its code to what Llama 3.1 published."""
    if isinstance(scaling, LinearRopeScaling):
        return {"seq_len_interpolation_factor": scaling.factor}
    if not isinstance(scaling, Llama3RopeScaling):
        raise NotSupportedError(f"megatron-core is not told {scaling} here. Verify this model with --engine reference")
    fixed = Llama3RopeScaling(factor=scaling.factor)
    if scaling != fixed:
        raise NotSupportedError(
            f"megatron-core computes rope scaling as {fixed} and cannot be told {scaling}. "
            "Verify this model with --engine reference"
        )
    return {"rope_scaling": True, "rope_scaling_factor": scaling.factor}
