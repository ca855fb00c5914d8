"""What Megatron-Bridge needs beside the weights: `run_config.yaml` and its own record of a run's step.

Bridge (0.6.2: training/model_load_save.py, training/checkpointing.py, training/state.py) rebuilds the model from
run_config.yaml alone, looks for `iter_*` folders, and takes the newest step from latest_train_state.pt. Its generic
GPTModelProvider computes every family here. Fields that are not named keep that class's defaults.
"""

from __future__ import annotations

import io
from typing import Any

import torch

from ckptbridge.converters.mcore.run_config import RUN_CONFIG
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.rope_scaling import Llama3RopeScaling

TRAIN_STATE = "train_state.pt"
BRIDGE_NOTE = (
    "Megatron-Bridge looks for iter_* folders, so the weights are an iteration's and no release: Megatron-LM loads "
    "them with --finetune"
)
_PROVIDER = "megatron.bridge.models.gpt_provider.GPTModelProvider"
_UNLIKE_LAYERS = "megatron.core.models.gpt.gpt_layer_specs.get_gpt_decoder_block_spec"
_SAME = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("vocab_size", "layernorm_epsilon", "init_method_std", "share_embeddings_and_output_weights"),
    *("add_qkv_bias", "qk_layernorm", "rotary_base"),
)
_SAME_MOE = (
    *("num_moe_experts", "moe_ffn_hidden_size", "moe_router_topk", "moe_router_pre_softmax", "moe_aux_loss_coeff"),
    *("moe_shared_expert_intermediate_size", "moe_shared_expert_gate"),
)


def bridge_files(
    config: ModelConfig, layout: ParallelLayout, dtype: torch.dtype, folder: str, step: int = 0
) -> list[tuple[str, bytes]]:
    """Bridge's files around the iteration's folder named `folder`: (path from the root, bytes)."""
    state = _train_state(step)
    return [
        (f"{folder}/{RUN_CONFIG}", _run_config(config, layout, dtype)),
        (f"{folder}/{TRAIN_STATE}", state),
        (f"latest_{TRAIN_STATE}", state),
    ]


def _run_config(config: ModelConfig, layout: ParallelLayout, dtype: torch.dtype) -> bytes:
    import yaml  # few conversions need it

    scaling = config.rope_scaling if isinstance(config.rope_scaling, Llama3RopeScaling) else None
    model: dict[str, Any] = {
        "_target_": _PROVIDER,
        **{name: getattr(config, name) for name in _SAME},
        "seq_length": config.max_position_embeddings,
        "make_vocab_size_divisible_by": _largest_divisor(config.vocab_size),
        "should_pad_vocab": False,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": _object("torch.nn.functional.silu"),
        "add_bias_linear": False,
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "rope_scaling": scaling is not None,
        "rope_scaling_factor": scaling.factor if scaling else 1.0,
        "window_size": [config.window_size - 1, 0] if config.window_size else None,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "params_dtype": _object(str(dtype)),
        "pipeline_dtype": _object(str(dtype)),
        "autocast_dtype": _object(str(dtype)),
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "num_layers_in_first_pipeline_stage": layout.first_stage_layers,
        "num_layers_in_last_pipeline_stage": layout.last_stage_layers,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.expert_tp,
    }
    if config.num_moe_experts is not None:
        model |= {name: getattr(config, name) for name in _SAME_MOE}
        model |= {
            "moe_grouped_gemm": True,
            "moe_token_dispatcher_type": "alltoall",
            "moe_router_load_balancing_type": "aux_loss",
            "moe_router_dtype": "fp32",
            "sequence_parallel": layout.tp > 1,  # Megatron trains a mixture under tensor parallelism no other way
        }
        if isinstance(config.moe_layer_freq, tuple):
            model["moe_layer_freq"] = list(config.moe_layer_freq)
            model["transformer_layer_spec"] = {
                "_target_": _UNLIKE_LAYERS,
                "_partial_": True,
                "_args_": [],
                "use_transformer_engine": True,
            }
        else:
            model["moe_layer_freq"] = config.moe_layer_freq
    checkpoint = {"save_optim": False, "save_rng": False, "fully_parallel_save": True, "ckpt_format": "torch_dist"}
    return yaml.safe_dump({"model": model, "checkpoint": checkpoint}, sort_keys=True).encode()


def _object(path: str) -> dict[str, Any]:
    """An object that Bridge looks up by its path, and does not call."""
    return {"_target_": path, "_call_": False}


def _largest_divisor(vocab_size: int) -> int:
    """The multiple of which Bridge's own import says that the vocabulary is one: a power of two up to 128."""
    return next(power for power in (128, 64, 32, 16, 8, 4, 2, 1) if vocab_size % power == 0)


def _train_state(step: int) -> bytes:
    """A run at this step, of which nothing else is known."""
    counts = ("step", "consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
    state = {name: torch.tensor(0, dtype=torch.int64) for name in counts}
    state["step"] = torch.tensor(step, dtype=torch.int64)
    state["floating_point_operations_so_far"] = torch.tensor(0.0, dtype=torch.float32)
    state |= {name: torch.tensor(False) for name in ("do_train", "do_valid", "do_test")}
    out = io.BytesIO()
    torch.save(state, out)
    return out.getvalue()
