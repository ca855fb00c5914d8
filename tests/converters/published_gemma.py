"""config.json of Gemma, Granite and Nemotron as published."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]

_GEMMA: Json = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "head_dim": 256,
    "initializer_range": 0.02,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 256000,
}
_GEMMA2: Json = _GEMMA | {
    "architectures": ["Gemma2ForCausalLM"],
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "model_type": "gemma2",
    "sliding_window": 4096,
    "torch_dtype": "float32",
    "transformers_version": "4.42.4",
}
_GRANITE: Json = {
    "attention_bias": False,
    "attention_dropout": 0.1,
    "bos_token_id": 0,
    "embedding_multiplier": 12.0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
_NEMOTRON: Json = {
    "architectures": ["NemotronForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "hidden_act": "relu2",
    "initializer_range": 0.0134,
    "max_position_embeddings": 4096,
    "mlp_bias": False,
    "model_type": "nemotron",
    "norm_eps": 1e-05,
    "num_key_value_heads": 8,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 256000,
}

GEMMA_GRANITE_NEMOTRON: dict[str, Json] = {
    "gemma-2b": _GEMMA
    | {
        "architectures": ["GemmaForCausalLM"],
        "hidden_act": "gelu",
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "model_type": "gemma",
        "num_attention_heads": 8,
        "num_hidden_layers": 18,
        "num_key_value_heads": 1,
        "rope_scaling": None,
        "transformers_version": "4.38.0.dev0",
    },
    "gemma-7b": _GEMMA
    | {
        "architectures": ["GemmaForCausalLM"],
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "model_type": "gemma",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 16,
        "rope_scaling": None,
        "transformers_version": "4.38.1",
    },
    "gemma-2-2b": _GEMMA2
    | {
        "head_dim": 256,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
    },
    "gemma-2-27b": _GEMMA2
    | {
        "head_dim": 128,
        "hidden_size": 4608,
        "intermediate_size": 36864,
        "num_attention_heads": 32,
        "num_hidden_layers": 46,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 144,
    },
    "gemma-3-1b-pt": _GEMMA
    | {
        "architectures": ["Gemma3ForCausalLM"],
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "transformers_version": "4.50.0.dev0",
        "vocab_size": 262144,
    },
    "granite-3.0-2b-base": _GRANITE
    | {
        "architectures": ["GraniteForCausalLM"],
        "attention_multiplier": 0.015625,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "logits_scaling": 8.0,
        "mlp_bias": False,
        "model_type": "granite",
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "transformers_version": "4.46.0.dev0",
        "vocab_size": 49152,
    },
    "granite-3.0-1b-a400m-base": _GRANITE
    | {
        "architectures": ["GraniteMoeForCausalLM"],
        "attention_multiplier": 0.015625,
        "hidden_size": 1024,
        "intermediate_size": 512,
        "logits_scaling": 6.0,
        "model_type": "granitemoe",
        "num_attention_heads": 16,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 24,
        "num_local_experts": 32,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "transformers_version": "4.46.0.dev0",
        "vocab_size": 49152,
    },
    "Minitron-4B-Base": _NEMOTRON
    | {
        "head_dim": 128,
        "hidden_size": 3072,
        "intermediate_size": 9216,
        "num_attention_heads": 24,
        "num_hidden_layers": 32,
        "transformers_version": "4.32.0.dev0",
    },
    "Nemotron-4-340B-Base": _NEMOTRON
    | {
        "head_dim": 192,
        "hidden_size": 18432,
        "intermediate_size": 73728,
        "num_attention_heads": 96,
        "num_hidden_layers": 96,
        "transformers_version": "4.44.0",
    },
}
"""By the name of the model on the Hub, without its owner."""

GEMMA_GRANITE_NEMOTRON_PARAMETERS: dict[str, tuple[float, float]] = {
    "gemma-2b": (2.506e9, 2.506e9),
    "gemma-7b": (8.54e9, 8.54e9),
    "gemma-2-2b": (2.614e9, 2.614e9),
    "gemma-2-27b": (27.23e9, 27.23e9),
    "gemma-3-1b-pt": (1.0e9, 1.0e9),
    "granite-3.0-2b-base": (2.533e9, 2.533e9),
    "granite-3.0-1b-a400m-base": (1.334e9, 0.43e9),
    "Minitron-4B-Base": (4.19e9, 4.19e9),
    "Nemotron-4-340B-Base": (341e9, 341e9),
}
"""(all, active) parameters as the model cards give them."""
