"""config.json of Llama, Mistral and Mixtral as published."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]

_LLAMA: Json = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
_MISTRAL: Json = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32000,
}


def _llama_3_rope(factor: float) -> Json:
    return {
        "factor": factor,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }


LLAMA: dict[str, Json] = {
    "Llama-3.1-8B": _LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "rope_scaling": _llama_3_rope(8.0),
        "tie_word_embeddings": False,
        "transformers_version": "4.43.0.dev0",
    },
    "Llama-3.2-1B": _LLAMA
    | {
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "rope_scaling": _llama_3_rope(32.0),
        "tie_word_embeddings": True,
        "transformers_version": "4.45.0.dev0",
    },
    "Mistral-7B-v0.1": _MISTRAL
    | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "transformers_version": "4.34.0.dev0",
    },
    "Mixtral-8x7B-v0.1": _MISTRAL
    | {
        "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0,
        "model_type": "mixtral",
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "transformers_version": "4.36.0.dev0",
    },
}
"""By the name of the model on the Hub, without its owner."""

LLAMA_PARAMETERS: dict[str, tuple[float, float]] = {
    "Llama-3.1-8B": (8.03e9, 8.03e9),
    "Llama-3.2-1B": (1.236e9, 1.236e9),
    "Mistral-7B-v0.1": (7.242e9, 7.242e9),
    "Mixtral-8x7B-v0.1": (46.7e9, 12.9e9),
}
"""(all, active) parameters as the model cards give them."""
