"""What Megatron-Core must be told to compute what a Hugging Face config says.

Written from the two libraries' documentation, apart from the converters, which it helps to judge.
"""

from __future__ import annotations

from typing import Any


def megatron_kwargs(hf: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Keyword arguments, as JSON, from the contents of config.json.

    "transformer" holds those of TransformerConfig, "gpt" those of GPTModel.
    Raises KeyError for a model_type that is not listed here.
    """
    family = hf["model_type"]
    attention = _ATTENTION[family](hf)
    rope = hf["rope_parameters"]
    transformer = {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "ffn_hidden_size": hf["intermediate_size"],
        "num_attention_heads": hf["num_attention_heads"],
        "num_query_groups": hf["num_key_value_heads"],
        "kv_channels": hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        "layernorm_epsilon": hf["rms_norm_eps"],
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "add_bias_linear": False,
        **attention,
        **(_moe(hf) if "num_experts_per_tok" in hf else {}),
    }
    gpt = {
        "vocab_size": -(-hf["vocab_size"] // 256) * 256,  # a multiple of 128 x TP up to TP2, as Megatron-LM pads
        "max_sequence_length": hf["max_position_embeddings"],
        "position_embedding_type": "rope",
        "rotary_base": rope["rope_theta"],
        "rotary_percent": 1.0,
        "share_embeddings_and_output_weights": hf["tie_word_embeddings"],
    }
    if rope["rope_type"] == "llama3":
        gpt |= {"rope_scaling": True, "rope_scaling_factor": rope["factor"]}
    return {"transformer": transformer, "gpt": gpt}


_ATTENTION = {
    "llama": lambda hf: {},
    "mistral": lambda hf: {"window_size": [hf["sliding_window"] - 1, 0]},  # tokens before this one, tokens after it
    "mixtral": lambda hf: {},
    "qwen2": lambda hf: {"add_qkv_bias": True},
    "qwen2_moe": lambda hf: {"add_qkv_bias": True},
    "qwen3": lambda hf: {"qk_layernorm": True},
    "qwen3_moe": lambda hf: {"qk_layernorm": True},
}


def _moe(hf: dict[str, Any]) -> dict[str, Any]:
    mixtral = hf["model_type"] == "mixtral"
    experts = hf["num_local_experts"] if "num_local_experts" in hf else hf["num_experts"]
    moe = {
        "num_moe_experts": experts,
        "moe_router_topk": hf["num_experts_per_tok"],
        "moe_ffn_hidden_size": hf["intermediate_size"] if mixtral else hf["moe_intermediate_size"],
        # Softmax before top-k leaves the chosen weights as they are; after top-k they sum to one.
        "moe_router_pre_softmax": not (mixtral or hf["norm_topk_prob"]),
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
    }
    if "shared_expert_intermediate_size" in hf:
        moe |= {
            "moe_shared_expert_intermediate_size": hf["shared_expert_intermediate_size"],
            "moe_shared_expert_gate": True,
        }
    if not mixtral and (hf["mlp_only_layers"] or hf["decoder_sparse_step"] > 1):
        moe["moe_layer_freq"] = [
            int(layer not in hf["mlp_only_layers"] and (layer + 1) % hf["decoder_sparse_step"] == 0)
            for layer in range(hf["num_hidden_layers"])
        ]
    return moe
