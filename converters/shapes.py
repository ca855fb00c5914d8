"""The shape of every Megatron-Core parameter, from the model's config alone."""

from __future__ import annotations

from collections.abc import Callable

from ckptbridge.converters.model_config import ModelConfig

# H hidden_size, F width of an expert, N heads, G query groups, D head dim, E experts, V vocabulary


def _qkv_rows(c: ModelConfig) -> int:
    return (c.num_attention_heads + 2 * c.num_query_groups) * c.kv_channels


def _normed_heads(c: ModelConfig, heads: int) -> int:
    """How many heads a norm of queries or keys spans."""
    return heads if c.qk_layernorm_whole else 1


def _kv_latent(c: ModelConfig) -> int:
    return c.kv_lora_rank or 0


def _value_head(c: ModelConfig) -> int:
    """Latent attention's values have a width of their own."""
    return c.v_head_dim or c.kv_channels


def _expert_ffn(c: ModelConfig) -> int:
    return c.moe_ffn_hidden_size or 0


def _shared_ffn(c: ModelConfig) -> int:
    return c.moe_shared_expert_intermediate_size or 0


def _fc1_rows(c: ModelConfig, width: int) -> int:
    """gate_proj above up_proj, or one matrix where there is no gated unit."""
    return (1 + c.gated_linear_unit) * width


_SHAPES: dict[str, Callable[[ModelConfig], tuple[int, ...]]] = {
    "embedding.word_embeddings.weight": lambda c: (c.vocab_size, c.hidden_size),
    "output_layer.weight": lambda c: (c.vocab_size, c.hidden_size),
    "output_layer.bias": lambda c: (c.vocab_size,),
    "decoder.final_layernorm.weight": lambda c: (c.hidden_size,),
    "decoder.final_layernorm.bias": lambda c: (c.hidden_size,),
    "self_attention.linear_qkv.weight": lambda c: (_qkv_rows(c), c.hidden_size),
    "self_attention.linear_qkv.bias": lambda c: (_qkv_rows(c),),
    "self_attention.linear_qkv.layer_norm_weight": lambda c: (c.hidden_size,),
    "self_attention.linear_qkv.layer_norm_bias": lambda c: (c.hidden_size,),
    "self_attention.q_layernorm.weight": lambda c: (_normed_heads(c, c.num_attention_heads) * c.kv_channels,),
    "self_attention.k_layernorm.weight": lambda c: (_normed_heads(c, c.num_query_groups) * c.kv_channels,),
    "self_attention.linear_proj.weight": lambda c: (c.hidden_size, c.num_attention_heads * _value_head(c)),
    "self_attention.linear_q_proj.weight": lambda c: (c.num_attention_heads * c.kv_channels, c.hidden_size),
    "self_attention.linear_q_down_proj.weight": lambda c: (c.q_lora_rank or 0, c.hidden_size),
    "self_attention.linear_q_up_proj.layer_norm_weight": lambda c: (c.q_lora_rank or 0,),
    "self_attention.linear_q_up_proj.weight": lambda c: (c.num_attention_heads * c.kv_channels, c.q_lora_rank or 0),
    "self_attention.linear_kv_down_proj.weight": lambda c: (
        _kv_latent(c) + (c.qk_pos_emb_head_dim or 0),
        c.hidden_size,
    ),
    "self_attention.linear_kv_up_proj.layer_norm_weight": lambda c: (_kv_latent(c),),
    "self_attention.linear_kv_up_proj.weight": lambda c: (
        c.num_attention_heads * ((c.qk_head_dim or 0) + _value_head(c)),
        _kv_latent(c),
    ),
    "input_layernorm.weight": lambda c: (c.hidden_size,),
    "pre_mlp_layernorm.weight": lambda c: (c.hidden_size,),
    "pre_mlp_layernorm.bias": lambda c: (c.hidden_size,),
    "mlp.linear_fc1.layer_norm_weight": lambda c: (c.hidden_size,),
    "mlp.linear_fc1.layer_norm_bias": lambda c: (c.hidden_size,),
    "mlp.linear_fc1.weight": lambda c: (_fc1_rows(c, c.ffn_hidden_size), c.hidden_size),
    "self_attention.linear_proj.post_layernorm.weight": lambda c: (c.hidden_size,),
    "mlp.linear_fc2.post_layernorm.weight": lambda c: (c.hidden_size,),
    "mlp.linear_fc1.bias": lambda c: (_fc1_rows(c, c.ffn_hidden_size),),
    "mlp.linear_fc2.bias": lambda c: (c.hidden_size,),
    "mlp.linear_fc2.weight": lambda c: (c.hidden_size, c.ffn_hidden_size),
    "mlp.router.expert_bias": lambda c: (c.num_moe_experts or 0,),
    "mlp.router.weight": lambda c: (c.num_moe_experts or 0, c.hidden_size),
    "mlp.experts.experts.linear_fc1.weight": lambda c: (_fc1_rows(c, _expert_ffn(c)), c.hidden_size),
    "mlp.experts.experts.linear_fc2.weight": lambda c: (c.hidden_size, _expert_ffn(c)),
    "self_attention.core_attention.softmax_offset": lambda c: (c.num_attention_heads,),
    "self_attention.linear_proj.bias": lambda c: (c.hidden_size,),
    "mlp.router.bias": lambda c: (c.num_moe_experts or 0,),
    "mlp.experts.experts.linear_fc1.bias": lambda c: (_fc1_rows(c, _expert_ffn(c)),),
    "mlp.experts.experts.linear_fc2.bias": lambda c: (c.hidden_size,),
    "mlp.shared_experts.linear_fc1.weight": lambda c: (_fc1_rows(c, _shared_ffn(c)), c.hidden_size),
    "mlp.shared_experts.linear_fc2.weight": lambda c: (c.hidden_size, _shared_ffn(c)),
    "mlp.shared_experts.gate_weight": lambda c: (1, c.hidden_size),
    "mtp.layers.{layer}.enorm.weight": lambda c: (c.hidden_size,),
    "mtp.layers.{layer}.hnorm.weight": lambda c: (c.hidden_size,),
    "mtp.layers.{layer}.eh_proj.weight": lambda c: (c.hidden_size, 2 * c.hidden_size),
    "mtp.layers.{layer}.final_layernorm.weight": lambda c: (c.hidden_size,),
}


_LAYERS = ("decoder.layers.{layer}.", "mtp.layers.{layer}.transformer_layer.")


def mcore_shape(template: str, config: ModelConfig) -> tuple[int, ...]:
    """The shape of one layer's (and one expert's) parameter; `template` may hold {layer} and {expert}.

    Raises KeyError for a parameter that no table row may name.
    """
    bare = template.replace("{expert}.", "")
    for prefix in _LAYERS:
        bare = bare.removeprefix(prefix)
    return _SHAPES[bare](config)
