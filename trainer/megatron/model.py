"""A real megatron-core GPTModel on the CPU, under any parallel layout of the running ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.activations import fast_gelu, quick_gelu, squared_relu
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
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
_TE_NAMES_LATENT = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}
_TE_NAMES_DENSE = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}

_ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": fast_gelu,
    "quick_gelu": quick_gelu,
    "squared_relu": squared_relu,
}

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


def transformer_of(
    told: dict[str, Any], *, tp: int, pp: int, ep: int, etp: int, dtype: torch.dtype = torch.float32
) -> TransformerConfig:
    """The TransformerConfig of keyword arguments as JSON has them, for ranks without a GPU."""
    kwargs = dict(told)
    activation = _ACTIVATIONS[kwargs.pop("activation_func", "silu")]
    if kwargs.get("window_size"):
        kwargs["window_size"] = tuple(kwargs["window_size"])
    attributes = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("yarn_")}
    kind = MLATransformerConfig if kwargs.get("multi_latent_attention") else TransformerConfig
    transformer = kind(
        **kwargs,
        **_UNFUSED,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        activation_func=activation,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True,
    )
    for name, value in attributes.items():
        setattr(transformer, name, value)
    return transformer


def use_te_names(layer_specs: list[Any], *, is_latent: bool = False) -> None:
    """Let these layers save and load under the keys that Transformer Engine's modules have."""
    attention_names = _TE_NAMES_LATENT if is_latent else _TE_NAMES
    for layer in layer_specs:
        is_moe = "MoELayer" in repr(layer.submodules.mlp)
        layer.submodules.sharded_state_dict_keys_map = attention_names | ({} if is_moe else _TE_NAMES_DENSE)


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
    transformer = transformer_of(config["transformer"], tp=tp, pp=pp, ep=ep, etp=etp, dtype=dtype)
    norm = transformer.normalization
    spec = get_gpt_decoder_block_spec(transformer, use_transformer_engine=False, normalization=norm)
    if not local_names:
        use_te_names(spec.layer_specs, is_latent=transformer.multi_latent_attention)
    for layer in spec.layer_specs if transformer.multi_latent_attention else []:
        layer.submodules.self_attention.submodules.core_attention = LatentCoreAttention
    model = GPTModel(
        transformer,
        spec,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=False,
        mtp_block_spec=get_gpt_mtp_block_spec(transformer, spec, use_transformer_engine=False)
        if transformer.mtp_num_layers
        else None,
        **config["gpt"],
    )
    return model.to(dtype).eval()  # norms are made in fp32 whatever params_dtype says


class LatentCoreAttention(DotProductAttention):
    """Megatron's own attention for values of another width than keys, which only Transformer Engine's is built for."""

    def __init__(self, *args: Any, k_channels: int | None = None, v_channels: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition


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
