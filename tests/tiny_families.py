"""Tiny models of the families that go through the families' oracles only: names, round trips, logits, faults."""

from __future__ import annotations

from typing import Any

from tests.tiny_model import TinyModel

_DEEPSEEK: dict[str, Any] = {
    **{"num_key_value_heads": 8, "kv_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 20},
    **{"n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 40, "n_shared_experts": 2},
    **{"first_k_dense_replace": 1, "rms_norm_eps": 1e-6},
}
_DEEPSEEK_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    **{"rope_theta": 10000.0, "factor": 40.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.7},
    "original_max_position_embeddings": 16,
}
_GEMMA: dict[str, Any] = {"head_dim": 32, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
_GRANITE: dict[str, Any] = {
    **{"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.25, "logits_scaling": 0.5},
    "attention_bias": True,
}
_NO_RESIDUAL_MULTIPLIER = "it has no multiplier for what attention and MLP add to the residual stream"

_GLM: dict[str, Any] = {
    **{"head_dim": 16, "attention_bias": True, "first_k_dense_replace": 1},
    **{"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "n_shared_experts": 1},
}

FURTHER: dict[str, TinyModel] = {
    "glm4_moe": TinyModel(
        hf_class="Glm4Moe",
        config=_GLM | {"use_qk_norm": True, "routed_scaling_factor": 2.5},
        further_layers=1,
    ),
    # Every head turns in its first quarter; as transformers saves it.
    "glm4_moe_air": TinyModel(
        hf_class="Glm4Moe", config=_GLM | {"partial_rotary_factor": 0.25, "attention_bias": False}
    ),
    # megatron-core ranks a group by its best topk / topk_group experts: here, as the class, by one.
    "deepseek_v2": TinyModel(
        hf_class="DeepseekV2",
        config=_DEEPSEEK
        | {"q_lora_rank": 28, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 3}
        | {"num_experts_per_tok": 3, "routed_scaling_factor": 2.0, "rope_parameters": _DEEPSEEK_YARN},
    ),
    "deepseek_v2_lite": TinyModel(
        hf_class="DeepseekV2",
        config=_DEEPSEEK | {"q_lora_rank": None},
        not_in_megatron="without a latent of queries it norms what linear_q_proj gets once more",
    ),
    "deepseek_v3": TinyModel(
        hf_class="DeepseekV3",
        config=_DEEPSEEK
        | {"q_lora_rank": 28, "n_group": 4, "topk_group": 2, "num_mtp_layers": 2, "rope_parameters": _DEEPSEEK_YARN},
        further_layers=2,
    ),
    # As transformers saves it: config.json counts a further layer, which is not there. No group, as Kimi-K2.
    "deepseek_v3_saved": TinyModel(
        hf_class="DeepseekV3",
        config=_DEEPSEEK | {"q_lora_rank": 28, "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    ),
    "gemma": TinyModel(hf_class="Gemma", config=_GEMMA),
    # Scores and logits are large enough that the caps are felt; the first and the third layer have the window.
    "gemma2": TinyModel(
        hf_class="Gemma2",
        config=_GEMMA
        | {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 24}
        | {"sliding_window": 7},
        not_in_megatron="it caps neither scores nor logits, and norms nothing behind attention and MLP",
    ),
    "gemma3": TinyModel(
        hf_class="Gemma3Text",
        config=_GEMMA
        | {"query_pre_attn_scalar": 24, "sliding_window": 7}
        | {"layer_types": [*["sliding_attention"] * 2, "full_attention", "sliding_attention"]}
        | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        not_in_megatron="it norms nothing behind attention and MLP, and all its layers have one rotary base",
    ),
    "granite": TinyModel(
        hf_class="Granite", config=_GRANITE | {"tie_word_embeddings": True}, not_in_megatron=_NO_RESIDUAL_MULTIPLIER
    ),
    "granite_moe": TinyModel(
        hf_class="GraniteMoe",
        config=_GRANITE | {"num_local_experts": 4, "num_experts_per_tok": 2},
        not_in_megatron=_NO_RESIDUAL_MULTIPLIER,
    ),
    "nemotron": TinyModel(
        hf_class="Nemotron",
        config={"head_dim": 16, "norm_eps": 1e-5, "partial_rotary_factor": 0.5},
        without=("rms_norm_eps",),
    ),
    "phi3": TinyModel(hf_class="Phi3", config={"sliding_window": 7, "pad_token_id": 0}),
    # The text is longer than the first training; half of a head turns, as in Phi-4-mini.
    "phi3_long": TinyModel(
        hf_class="Phi3",
        config={
            "head_dim": 8,
            "original_max_position_embeddings": 16,
            "pad_token_id": 0,
            "partial_rotary_factor": 0.5,
            "rope_parameters": {"rope_type": "longrope", "short_factor": [1.0, 1.2], "long_factor": [1.1, 3.5]},
        },
        not_in_megatron="its rotary embedding has no factors for each frequency",
    ),
    # Numbers are large enough that the clamp cuts; the first and the third layer have the window.
    "gpt_oss": TinyModel(
        hf_class="GptOss",
        config={
            "head_dim": 16,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "sliding_window": 7,
            "swiglu_limit": 1.5,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 512,
            },
        },
        max_shard_size="300KB",
    ),
    "olmo2": TinyModel(
        hf_class="Olmo2",
        config={"pad_token_id": 0},
        not_in_megatron="it norms what attention and MLP add, and queries and keys over all heads",
    ),
    "olmo2_biased": TinyModel(
        hf_class="Olmo2",
        config={"pad_token_id": 0, "attention_bias": True},
        not_in_megatron="it norms what attention and MLP add, and queries and keys over all heads",
    ),
    "olmoe": TinyModel(
        hf_class="Olmoe",
        config={"pad_token_id": 0, "num_experts": 8, "num_experts_per_tok": 3},
        not_in_megatron="it norms queries and keys over all heads",
    ),
    "minimax_m2": TinyModel(
        hf_class="MiniMaxM2",
        config={
            "head_dim": 16,
            "num_experts_per_tok": 3,
            "num_local_experts": 8,
            "rms_norm_eps": 1e-6,
            # The same part of a head twice: transformers 5.17 does not read the first, published files have no other.
            "rotary_dim": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
        },
        not_in_megatron="it norms queries and keys over all heads",
    ),
    "phimoe": TinyModel(
        hf_class="Phimoe",
        config={
            "attention_bias": True,
            "lm_head_bias": True,
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.0, 1.1, 1.5, 2.0],
                "long_factor": [1.0, 1.1, 3.5, 7.0],
                "short_mscale": 1.2,
                "long_mscale": 1.2,
            },
            "router_jitter_noise": 0.1,
            "sliding_window": 7,
        },
        not_in_megatron="its router weighs experts one by one",
    ),
    "llama_biased": TinyModel(
        hf_class="Llama",
        config={
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
        },
    ),
    "qwen2_windowed": TinyModel(
        hf_class="Qwen2",
        config={
            "rms_norm_eps": 1e-6,
            "max_window_layers": 2,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            "sliding_window": 7,
            "use_sliding_window": True,
        },
    ),
    "qwen2_moe_windowed": TinyModel(
        hf_class="Qwen2Moe",
        config={
            "intermediate_size": 48,
            "moe_intermediate_size": 48,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "qkv_bias": False,
            "shared_expert_intermediate_size": 80,
            "sliding_window": 7,
            "use_sliding_window": True,
        },
    ),
    "qwen3_biased": TinyModel(
        hf_class="Qwen3",
        config={"head_dim": 16, "attention_bias": True},
        not_in_megatron="it has biases in attention only",
    ),
    "qwen3_moe_biased": TinyModel(
        hf_class="Qwen3Moe",
        config={
            "attention_bias": True,
            "head_dim": 16,
            "intermediate_size": 40,
            "moe_intermediate_size": 40,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": 7,
            "use_sliding_window": True,
        },
        not_in_megatron="it has biases in attention only",
    ),
    "mixtral_windowed": TinyModel(
        hf_class="Mixtral", config={"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7}
    ),
}
