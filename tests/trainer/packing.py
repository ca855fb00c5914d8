"""Hugging Face weights in the decoder's packed layout by plain loops: a second opinion on the converters' tables."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.rope_scaling import Llama3RopeScaling


def config_of(hf: object) -> ModelConfig:
    """The ModelConfig of a transformers config object of a family in tests/tiny.py."""

    def get(*names: str) -> object:
        return next((getattr(hf, name) for name in names if getattr(hf, name, None) is not None), None)

    rope = hf.rope_parameters
    kind = hf.model_type
    experts = get("num_experts", "num_local_experts")
    scaling = None
    if rope["rope_type"] == "llama3":
        scaling = Llama3RopeScaling(
            factor=rope["factor"],
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
            original_max_position_embeddings=rope["original_max_position_embeddings"],
        )
    layers = range(hf.num_hidden_layers)
    step, dense = getattr(hf, "decoder_sparse_step", 1), getattr(hf, "mlp_only_layers", [])
    return ModelConfig(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.intermediate_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=get("head_dim") or hf.hidden_size // hf.num_attention_heads,
        vocab_size=hf.vocab_size,
        layernorm_epsilon=hf.rms_norm_eps,
        rotary_base=rope["rope_theta"],
        rope_scaling=scaling,
        window_size=hf.sliding_window if kind in ("mistral", "mixtral") else None,
        share_embeddings_and_output_weights=hf.tie_word_embeddings,
        add_qkv_bias=kind in ("qwen2", "qwen2_moe"),
        qk_layernorm=kind in ("qwen3", "qwen3_moe"),
        num_moe_experts=experts,
        moe_ffn_hidden_size=get("moe_intermediate_size", "intermediate_size") if experts else None,
        moe_layer_freq=tuple(int(i not in dense and (i + 1) % step == 0) for i in layers),
        moe_router_topk=hf.num_experts_per_tok if experts else 2,
        moe_router_pre_softmax=experts is not None and not getattr(hf, "norm_topk_prob", True),
        moe_shared_expert_intermediate_size=get("shared_expert_intermediate_size") if experts else None,
        moe_shared_expert_gate=kind == "qwen2_moe",
    )


def packed(hf: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The decoder's state dict from a transformers state dict (or from its gradients)."""
    out = {
        "embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
    }
    if not config.share_embeddings_and_output_weights:
        out["output_layer.weight"] = hf["lm_head.weight"]
    for i in range(config.num_layers):
        source, target = f"model.layers.{i}.", f"decoder.layers.{i}."
        layer = {name.removeprefix(source): t for name, t in hf.items() if name.startswith(source)}
        for name, tensor in _layer(layer, config, config.is_moe_layer(i)).items():
            out[target + name] = tensor
    return {name: tensor.clone() for name, tensor in out.items()}


def _layer(hf: dict[str, Tensor], config: ModelConfig, moe: bool) -> dict[str, Tensor]:
    out = {
        "self_attention.linear_qkv.layer_norm_weight": hf["input_layernorm.weight"],
        "self_attention.linear_qkv.weight": _qkv([hf[f"self_attn.{x}_proj.weight"] for x in "qkv"], config),
        "self_attention.linear_proj.weight": hf["self_attn.o_proj.weight"],
    }
    if config.add_qkv_bias:
        out["self_attention.linear_qkv.bias"] = _qkv([hf[f"self_attn.{x}_proj.bias"] for x in "qkv"], config)
    if config.qk_layernorm:
        out["self_attention.q_layernorm.weight"] = hf["self_attn.q_norm.weight"]
        out["self_attention.k_layernorm.weight"] = hf["self_attn.k_norm.weight"]
    if not moe:
        out["mlp.linear_fc1.layer_norm_weight"] = hf["post_attention_layernorm.weight"]
        out["mlp.linear_fc1.weight"] = torch.cat([hf["mlp.gate_proj.weight"], hf["mlp.up_proj.weight"]])
        out["mlp.linear_fc2.weight"] = hf["mlp.down_proj.weight"]
        return out
    out["pre_mlp_layernorm.weight"] = hf["post_attention_layernorm.weight"]
    out["mlp.router.weight"] = hf["mlp.gate.weight"]
    # In memory transformers stacks the experts as Megatron does; on disk it does not.
    out["mlp.experts.experts.linear_fc1.weight"] = hf["mlp.experts.gate_up_proj"]
    out["mlp.experts.experts.linear_fc2.weight"] = hf["mlp.experts.down_proj"]
    if config.moe_shared_expert_intermediate_size:
        shared = "mlp.shared_expert"
        out["mlp.shared_experts.linear_fc1.weight"] = torch.cat(
            [hf[f"{shared}.gate_proj.weight"], hf[f"{shared}.up_proj.weight"]]
        )
        out["mlp.shared_experts.linear_fc2.weight"] = hf[f"{shared}.down_proj.weight"]
        out["mlp.shared_experts.gate_weight"] = hf["mlp.shared_expert_gate.weight"]
    return out


def _qkv(parts: list[Tensor], config: ModelConfig) -> Tensor:
    """Group by group: its query heads, its key head, its value head."""
    width = config.kv_channels
    q, k, v = (part.split(width) for part in parts)
    rows = []
    for group in range(config.num_query_groups):
        rows += q[group * config.heads_per_group : (group + 1) * config.heads_per_group]
        rows += [k[group], v[group]]
    return torch.cat(rows)
