"""Which fields of a model's config a program computes, so that no other one is silently passed over."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields

from ckptbridge.converters.errors import NotSupportedError
from ckptbridge.converters.model import Model
from ckptbridge.converters.model_config import ModelConfig

ALWAYS = frozenset(
    (
        *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
        *("vocab_size", "max_position_embeddings", "layernorm_epsilon", "rotary_base", "init_method_std"),
        *("share_embeddings_and_output_weights", "add_qkv_bias", "qk_layernorm", "rope_scaling", "window_size"),
        *("num_moe_experts", "moe_ffn_hidden_size", "moe_layer_freq", "moe_router_topk", "moe_router_pre_softmax"),
        *("moe_shared_expert_intermediate_size", "moe_shared_expert_gate", "moe_aux_loss_coeff"),
    )
)
_ATTENTION = frozenset(
    (
        *("rotary_percent", "local_rotary_base", "window_layers", "softmax_type", "softmax_scale"),
        *("attn_logit_softcapping", "qk_layernorm_whole", "add_proj_bias"),
        *("moe_router_sparse_mixer", "moe_router_jitter"),
    )
)
_REST = frozenset(
    (
        *("normalization", "layernorm_zero_centered_gamma", "pre_layernorm", "post_layernorm"),
        *("gated_linear_unit", "activation_func", "glu_linear_offset", "activation_func_clamp_value", "add_mlp_bias"),
        "add_router_bias",
        *("embedding_multiplier", "residual_multiplier", "logits_divisor", "final_logit_softcapping"),
        *("add_output_layer_bias",),
    )
)
_LATENT = frozenset(
    (
        *("multi_latent_attention", "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
        *("moe_router_score_function", "moe_router_enable_expert_bias", "moe_router_topk_scaling_factor"),
        *("moe_router_num_groups", "moe_router_group_topk", "moe_router_group_max", "mtp_num_layers"),
    )
)
COMPUTED = ALWAYS | _ATTENTION | _REST | _LATENT
"""The fields that the decoder knows."""
TRAINED = COMPUTED - {"final_logit_softcapping", "add_output_layer_bias"}
"""Those that training knows: its loss is computed from hidden states and the output matrix alone."""


def refuse_beyond(config: ModelConfig, computed: Collection[str], program: str) -> None:
    """Raises NotSupportedError naming every field that is set and that the program does not know."""
    beyond = [f for f in fields(config) if f.name not in computed and getattr(config, f.name) != f.default]
    if beyond:
        told = ", ".join(f"{field.name} = {getattr(config, field.name)!r}" for field in beyond)
        raise NotSupportedError(f"{program} does not compute {told}")


def refuse_untrained(model: Model) -> None:
    """Raises NotSupportedError naming the model and every field of its config that training does not know."""
    try:
        refuse_beyond(model.config, TRAINED, "training")
    except NotSupportedError as error:
        raise NotSupportedError(
            f"{model.path}: {model.family.architecture} cannot be trained: {error} (its loss is computed from hidden "
            "states and the output matrix alone). Converting, upcycling and verifying the model work; let "
            "model.init_from name one whose config does without"
        ) from error
