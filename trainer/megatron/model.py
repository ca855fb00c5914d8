"""A real megatron-core GPTModel on the CPU, under any parallel layout of the running ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

# No fused kernel runs on a CPU.
_UNFUSED = {
    "gradient_accumulation_fusion": False,
    "bias_dropout_fusion": False,
    "bias_activation_fusion": False,
    "masked_softmax_fusion": False,
    "persist_layer_norm": False,
    "apply_rope_fusion": False,
}

# Where Transformer Engine, which production runs use, keeps the norms: a checkpoint has its names.
_TE_NAMES = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
_TE_NAMES_DENSE = _TE_NAMES | {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}

_current_layout: tuple[int, ...] | None = None


def use_layout(tp: int, pp: int, ep: int, etp: int) -> None:
    """Make the process groups of a layout. Ranks beyond it are data-parallel replicas."""
    global _current_layout
    if _current_layout == (tp, pp, ep, etp):
        return
    if _current_layout is not None:
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )
    _current_layout = (tp, pp, ep, etp)


def build(
    config: dict[str, dict[str, Any]],
    *,
    local_names: bool,
    tp: int,
    pp: int,
    ep: int,
    etp: int,
    dtype: torch.dtype = torch.float32,
) -> GPTModel:
    """This rank's part of the model, in eval mode, with weights drawn by Megatron.

    `config["transformer"]` and `config["gpt"]` are keyword arguments of TransformerConfig and GPTModel, as JSON
    has them. `local_names` keeps the checkpoint keys that modules without Transformer Engine have by themselves.
    """
    kwargs = dict(config["transformer"])
    if kwargs.get("window_size"):
        kwargs["window_size"] = tuple(kwargs["window_size"])
    transformer = TransformerConfig(
        **kwargs,
        **_UNFUSED,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True,
    )
    spec = get_gpt_decoder_block_spec(transformer, use_transformer_engine=False, normalization="RMSNorm")
    for layer in [] if local_names else spec.layer_specs:
        moe = "MoELayer" in repr(layer.submodules.mlp)
        layer.submodules.sharded_state_dict_keys_map = _TE_NAMES if moe else _TE_NAMES_DENSE
    model = GPTModel(
        transformer,
        spec,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=False,
        **config["gpt"],
    )
    return model.to(dtype).eval()  # norms are made in fp32 whatever params_dtype says


def logits(model: GPTModel, tokens: Tensor) -> Tensor | None:
    """Logits [batch, length, padded vocabulary] on the last pipeline stage, None on the others."""
    batch, length = tokens.shape
    positions = torch.arange(length).expand(batch, length)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)  # True: not attended to
    if not model.pre_process:
        received = torch.empty(length, batch, model.config.hidden_size, dtype=model.config.params_dtype)
        dist.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(received)
    output = model(tokens, positions, mask)
    if model.post_process:
        return output
    dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
    return None
