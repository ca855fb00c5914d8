"""config.json of Qwen as published, dense and with experts."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]

_QWEN2: Json = {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_sliding_window": False,
}
_QWEN2_MOE: Json = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "model_type": "qwen2_moe",
    "norm_topk_prob": False,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "vocab_size": 151936,
}
_QWEN3: Json = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_QWEN3_MOE: Json = _QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}

QWEN: dict[str, Json] = {
    "Qwen2.5-7B": _QWEN2
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_mrope": False,
        "vocab_size": 152064,
    },
    "Qwen2-57B-A14B": _QWEN2
    | _QWEN2_MOE
    | {
        "moe_intermediate_size": 2560,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "shared_expert_intermediate_size": 20480,
    },
    "Qwen1.5-MoE-A2.7B": _QWEN2
    | _QWEN2_MOE
    | {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "max_position_embeddings": 8192,
        "max_window_layers": 21,
        "moe_intermediate_size": 1408,
        "num_attention_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 16,
        "shared_expert_intermediate_size": 5632,
        "sliding_window": 32768,
        "transformers_version": "4.39.0.dev0",
    },
    "Qwen3-8B": _QWEN3
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_window_layers": 36,
        "model_type": "qwen3",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
    },
    "Qwen3-30B-A3B": _QWEN3_MOE
    | {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_window_layers": 48,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_hidden_layers": 48,
    },
    "Qwen3-235B-A22B": _QWEN3_MOE
    | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_window_layers": 94,
        "moe_intermediate_size": 1536,
        "num_attention_heads": 64,
        "num_hidden_layers": 94,
    },
}
"""By the name of the model on the Hub, without its owner."""

QWEN_PARAMETERS: dict[str, tuple[float, float]] = {
    "Qwen2.5-7B": (7.616e9, 7.616e9),
    "Qwen2-57B-A14B": (57.41e9, 14.2e9),
    "Qwen1.5-MoE-A2.7B": (14.3e9, 2.7e9),
    "Qwen3-8B": (8.19e9, 8.19e9),
    "Qwen3-30B-A3B": (30.5e9, 3.3e9),
    "Qwen3-235B-A22B": (235.1e9, 22.2e9),
}
"""(all, active) parameters as the model cards give them."""
