"""megatron-core's GPTModel on Transformer Engine's modules, with its distributed optimizer on one GPU.

Grouped experts, fused permutation and router, fused rotation, weight gradients summed in fp32 inside the products,
fp32 main weights: what megatron-core offers on one GPU for these models, as far as it runs there.
"""

from __future__ import annotations

import os
import sys
import types
from typing import Any

import torch
from peers.program import Options, random_tokens
from slices import Slice
from torch import Tensor

from ckptbridge.trainer.megatron.config import transformer_config

_FUSED: dict[str, Any] = {
    "moe_grouped_gemm": True,
    "moe_permute_fusion": True,
    "moe_router_fusion": True,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 1e-2,
    "activation_func": torch.nn.functional.silu,
    "bias_activation_fusion": True,
    "apply_rope_fusion": True,
    "masked_softmax_fusion": True,
    "bias_dropout_fusion": True,
    "gradient_accumulation_fusion": True,
    "cross_entropy_loss_fusion": True,
    "cross_entropy_fusion_impl": "te",
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "bf16": True,
    "params_dtype": torch.bfloat16,
    "pipeline_dtype": torch.bfloat16,
}


class Megatron:
    """The model and optimizer of megatron-core. It keeps global state: one a process."""

    planned_gib = None

    def __init__(self, slice_: Slice, options: Options) -> None:
        if options.device.type != "cuda":
            raise ValueError(f"megatron-core with Transformer Engine runs on a GPU, not on {options.device}")
        start_megatron(options.seed)
        import megatron.core
        import transformer_engine
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer import TransformerConfig

        told = transformer_config(slice_.config)
        transformer = TransformerConfig(**(told["transformer"] | _FUSED))
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=slice_.config.num_moe_experts, moe_grouped_gemm=True, qk_layernorm=slice_.config.qk_layernorm
        )
        model = GPTModel(transformer, spec, **told["gpt"]).cuda().bfloat16()
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        buckets = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=False
        )
        self.model = DistributedDataParallel(transformer, buckets, model)
        moments: dict[str, Any] = {}
        if options.moments != torch.float32:
            moments = {"exp_avg_dtype": options.moments, "exp_avg_sq_dtype": options.moments}
            moments["use_precision_aware_optimizer"] = True
        adam = OptimizerConfig(
            optimizer="adam", lr=1e-5, bf16=True, use_distributed_optimizer=True, clip_grad=1.0, **moments
        )
        self.optimizer = get_megatron_optimizer(adam, [self.model])
        self.finalize = finalize_model_grads
        shape = (slice_.micro_batch_size, slice_.sequence_length + 1)
        ids_BS = random_tokens(shape, slice_.config.vocab_size, options.device)
        self.ids_BS, self.labels_BS = ids_BS[:, :-1].contiguous(), ids_BS[:, 1:].contiguous()
        self.positions_BS = torch.arange(slice_.sequence_length, device=options.device).expand(shape[0], -1)
        self.description = (
            f"megatron-core {megatron.core.__version__}, Transformer Engine {transformer_engine.__version__}, "
            f"fp32 main weights, {str(options.moments).removeprefix('torch.')} moments"
        )

    def forward_backward(self) -> Tensor:
        self.model.zero_grad_buffer()
        loss = self.model(self.ids_BS, self.positions_BS, None, labels=self.labels_BS).float().mean()
        loss.backward()
        return loss.detach()

    def step(self) -> Tensor:
        loss = self.forward_backward()
        self.finalize([self.model])
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def start_megatron(seed: int) -> None:
    """The process group and random state that megatron-core wants, and its stand-in for a kernel of apex's."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    sys.modules["fused_weight_gradient_mlp_cuda"] = _weight_gradient_module()
    torch.cuda.set_device(0)
    # A store in memory: nothing listens on a port, and nothing is left behind.
    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _weight_gradient_module() -> types.ModuleType:
    """What `gradient_accumulation_fusion` calls for the output layer; Transformer Engine's modules do it themselves.

    Apex's kernel is a product that cuBLAS adds to the fp32 gradient, which torch offers too.
    """

    def accumulate(inputs: Tensor, gradient: Tensor, main: Tensor) -> None:
        inputs, gradient = inputs.flatten(0, -2), gradient.flatten(0, -2)
        torch.addmm(main, gradient.t(), inputs, out_dtype=torch.float32, out=main)

    module = types.ModuleType("fused_weight_gradient_mlp_cuda")
    module.wgrad_gemm_accum_fp32 = module.wgrad_gemm_accum_fp16 = accumulate  # type: ignore[attr-defined]
    return module
