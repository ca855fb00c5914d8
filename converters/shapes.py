"""The shape of every Megatron-Core parameter, from the model's config alone."""

from __future__ import annotations

from collections.abc import Callable

from ckptbridge.converters.model_config import ModelConfig

# H hidden_size, F width of an expert, N heads, G query groups, D head dim, E experts, V vocabulary


def _qkv_rows(c: ModelConfig) -> int:
    return (c.num_attention_heads + 2 * c.num_query_groups) * c.kv_channels


def _expert_ffn(c: ModelConfig) -> int:
    return c.moe_ffn_hidden_size or 0


def _shared_ffn(c: ModelConfig) -> int:
    return c.moe_shared_expert_intermediate_size or 0


_SHAPES: dict[str, Callable[[ModelConfig], tuple[int, ...]]] = {
    "embedding.word_embeddings.weight": lambda c: (c.vocab_size, c.hidden_size),
    "output_layer.weight": lambda c: (c.vocab_size, c.hidden_size),
    "decoder.final_layernorm.weight": lambda c: (c.hidden_size,),
    "self_attention.linear_qkv.weight": lambda c: (_qkv_rows(c), c.hidden_size),
    "self_attention.linear_qkv.bias": lambda c: (_qkv_rows(c),),
    "self_attention.linear_qkv.layer_norm_weight": lambda c: (c.hidden_size,),
    "self_attention.q_layernorm.weight": lambda c: (c.kv_channels,),
    "self_attention.k_layernorm.weight": lambda c: (c.kv_channels,),
    "self_attention.linear_proj.weight": lambda c: (c.hidden_size, c.num_attention_heads * c.kv_channels),
    "pre_mlp_layernorm.weight": lambda c: (c.hidden_size,),
    "mlp.linear_fc1.layer_norm_weight": lambda c: (c.hidden_size,),
    "mlp.linear_fc1.weight": lambda c: (2 * c.ffn_hidden_size, c.hidden_size),
    "mlp.linear_fc2.weight": lambda c: (c.hidden_size, c.ffn_hidden_size),
    "mlp.router.weight": lambda c: (c.num_moe_experts or 0, c.hidden_size),
    "mlp.experts.experts.linear_fc1.weight": lambda c: (2 * _expert_ffn(c), c.hidden_size),
    "mlp.experts.experts.linear_fc2.weight": lambda c: (c.hidden_size, _expert_ffn(c)),
    "mlp.shared_experts.linear_fc1.weight": lambda c: (2 * _shared_ffn(c), c.hidden_size),
    "mlp.shared_experts.linear_fc2.weight": lambda c: (c.hidden_size, _shared_ffn(c)),
    "mlp.shared_experts.gate_weight": lambda c: (1, c.hidden_size),
}


def mcore_shape(template: str, config: ModelConfig) -> tuple[int, ...]:
    """The shape of one layer's (and one expert's) parameter; `template` may hold {layer} and {expert}.

    Raises KeyError for a parameter that no table row may name.
    """
    bare = template.replace("decoder.layers.{layer}.", "").replace("{expert}.", "")
    return _SHAPES[bare](config)
