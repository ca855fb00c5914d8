"""The run's arguments inside a Megatron checkpoint, made from a ModelConfig.

Megatron-LM compares some of them on load, copies others with `--use-checkpoint-args`, and fails where one that
it reads is absent (megatron-core 0.19, training/checkpointing.py and argument_utils.py).
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict, fields
from typing import Any

import torch

from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.rope_scaling import LinearRopeScaling, Llama3RopeScaling, YarnRopeScaling, kind_of

MEGATRON_ROPE_SCALING = Llama3RopeScaling(factor=8.0)
"""What pretrain_gpt.py computes whatever --rope-scaling-factor says: only the switch is forwarded."""

SAME = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("max_position_embeddings", "add_qkv_bias", "qk_layernorm", "init_method_std", "moe_router_topk"),
    *("moe_router_pre_softmax", "moe_shared_expert_gate", "moe_aux_loss_coeff"),
)
"""Fields that have one name in ModelConfig and in Megatron's arguments, and that every version has."""
SAME_WHERE_SET = (
    *("rotary_percent", "normalization", "glu_linear_offset", "activation_func_clamp_value", "softmax_type"),
    *("softmax_scale", "layernorm_zero_centered_gamma", "multi_latent_attention", "q_lora_rank", "kv_lora_rank"),
    *("qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "moe_router_score_function"),
    *("moe_router_enable_expert_bias", "moe_router_topk_scaling_factor", "moe_router_num_groups"),
    *("moe_router_group_topk",),
)
"""The same, for what not every model has."""
BEYOND = "ckptbridge_model"
"""The argument that holds what Megatron has no argument for: a dict of ModelConfig's fields that are not at their
defaults. Megatron passes over arguments that it does not know."""


def make_args(
    config: ModelConfig,
    *,
    padded_vocab_size: int,
    layout: ParallelLayout,
    dtype: torch.dtype,
    ckpt_format: str,
) -> Namespace:
    """Arguments that `--use-checkpoint-args` accepts and that describe this model."""
    rotary_base = int(config.rotary_base) if config.rotary_base == int(config.rotary_base) else config.rotary_base
    freq = config.moe_layer_freq
    values: dict[str, Any] = {name: getattr(config, name) for name in (*SAME, *SAME_WHERE_SET)}
    values |= {
        "seq_length": config.max_position_embeddings,
        "group_query_attention": not config.multi_latent_attention,  # Megatron-LM refuses both
        "position_embedding_type": "rope",
        "add_position_embedding": True,
        "use_rotary_position_embeddings": False,
        "rotary_base": rotary_base,
        "rotary_interleaved": False,
        "rotary_seq_len_interpolation_factor": _interpolation(config),
        "use_rope_scaling": isinstance(config.rope_scaling, Llama3RopeScaling),
        "rope_scaling_factor": config.rope_scaling.factor
        if isinstance(config.rope_scaling, Llama3RopeScaling)
        else 8.0,
        "window_size": (config.window_size - 1, 0) if config.window_size else None,
        "window_attn_skip_freq": list(config.window_layers) if config.window_layers else None,
        "add_bias_linear": config.add_proj_bias and config.add_mlp_bias,
        "swiglu": config.gated_linear_unit and config.activation_func == "silu",
        "squared_relu": config.activation_func == "squared_relu",
        "quick_geglu": config.gated_linear_unit and config.activation_func == "quick_gelu",
        # The second spelling of each is newer: Megatron-LM of 2026 names arguments after TransformerConfig's fields.
        "norm_epsilon": config.layernorm_epsilon,
        "layernorm_epsilon": config.layernorm_epsilon,
        "apply_layernorm_1p": config.layernorm_zero_centered_gamma,
        "apply_query_key_layer_scaling": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "untie_embeddings_and_output_weights": not config.share_embeddings_and_output_weights,
        "vocab_size": config.vocab_size,
        "padded_vocab_size": padded_vocab_size,
        "make_vocab_size_divisible_by": 128,
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": None,
        "num_experts": config.num_moe_experts,
        "moe_layer_freq": list(freq) if isinstance(freq, tuple) else freq,
        "moe_ffn_hidden_size": config.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": config.moe_shared_expert_intermediate_size,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_router_dtype": "fp32" if config.num_moe_experts else None,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": config.num_moe_experts is not None,
        "mtp_num_layers": config.mtp_num_layers or None,
        "spec": None,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "ckpt_format": ckpt_format,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "num_layers_per_virtual_pipeline_stage": None,
        "decoder_first_pipeline_num_layers": layout.first_stage_layers,
        "decoder_last_pipeline_num_layers": layout.last_stage_layers,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.expert_tp,
        "context_parallel_size": 1,
        "data_parallel_random_init": False,
        "iteration": 0,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }
    if isinstance(config.rope_scaling, YarnRopeScaling):
        values |= _yarn(config.rope_scaling, latent=config.multi_latent_attention)
    elif config.multi_latent_attention:
        values["rope_type"] = "rope"
    if beyond := _beyond(config):
        values[BEYOND] = beyond
    return Namespace(**values)


def _interpolation(config: ModelConfig) -> float | None:
    return config.rope_scaling.factor if isinstance(config.rope_scaling, LinearRopeScaling) else None


def _yarn(scaling: YarnRopeScaling, *, latent: bool) -> dict[str, Any]:
    """Latent attention has arguments of its own for YaRN; other attention has them with a prefix."""
    told: dict[str, Any] = {
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "mscale": 1.0 if scaling.mscale is None else scaling.mscale,
        "mscale_all_dim": scaling.mscale_all_dim or 0.0,
    }
    if latent:
        return {"rope_type": "yarn", "rotary_scaling_factor": scaling.factor, **told}
    told |= {"rotary_scaling_factor": scaling.factor, "correction_range_round_to_int": scaling.truncate}
    return {"position_embedding_type": "yarn", **{f"yarn_{name}": value for name, value in told.items()}}


TOLD_BY_ARGUMENTS = frozenset(
    (
        *SAME,
        *("vocab_size", "layernorm_epsilon", "rotary_base", "window_size", "share_embeddings_and_output_weights"),
        *("num_moe_experts", "moe_ffn_hidden_size", "moe_layer_freq", "moe_shared_expert_intermediate_size"),
    )
)
"""Fields that every Megatron-LM has arguments for, so that nothing beside them needs to be kept."""


def _beyond(config: ModelConfig) -> dict[str, Any]:
    """The other fields that are not at their defaults, as plain values."""
    made: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in TOLD_BY_ARGUMENTS or value == field.default:
            continue
        if field.name == "rope_scaling":
            if isinstance(value, Llama3RopeScaling):
                continue
            value = {"kind": kind_of(value), **{n: _plain(v) for n, v in asdict(value).items()}}
        made[field.name] = _plain(value)
    return made


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
