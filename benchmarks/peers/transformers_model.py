"""transformers' own causal LM, grouped experts, torch's attention; weights, gradients and Adam's moments in bf16.

There are no fp32 main weights: that is how its Trainer runs a bf16 model, and it makes a cheaper step than ours.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from peers.program import Options, random_tokens
from slices import Slice
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig


class Transformers:
    """A model made from its config, trained by `torch.optim.AdamW(fused=True)`."""

    planned_gib = None

    def __init__(self, slice_: Slice, options: Options) -> None:
        torch.manual_seed(options.seed)
        is_cuda = options.device.type == "cuda"
        with torch.device(options.device):
            self.model = AutoModelForCausalLM.from_config(
                hf_config(slice_),
                dtype=torch.bfloat16 if is_cuda else torch.float32,
                experts_implementation="grouped_mm" if is_cuda else "eager",
                attn_implementation="sdpa",
            )
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        shape = (slice_.micro_batch_size, slice_.sequence_length)
        self.ids_BS = random_tokens(shape, slice_.config.vocab_size, options.device)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.description = f"transformers {transformers.__version__}, bf16 weights, gradients and moments"

    def forward_backward(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(input_ids=self.ids_BS, labels=self.ids_BS, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def step(self) -> Tensor:
        loss = self.forward_backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss


def hf_config(slice_: Slice) -> PreTrainedConfig:
    """The config of the class whose layers the slice has."""
    config = slice_.config
    told: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.kv_channels,
        "max_position_embeddings": slice_.sequence_length,
        "num_experts_per_tok": config.moe_router_topk,
        "use_cache": False,
    }
    width, shared = config.moe_ffn_hidden_size, config.moe_shared_expert_intermediate_size
    if shared:
        return Qwen2MoeConfig(
            intermediate_size=shared,
            moe_intermediate_size=width,
            shared_expert_intermediate_size=shared,
            num_experts=config.num_moe_experts,
            norm_topk_prob=True,
            **told,
        )
    if config.qk_layernorm:
        return Qwen3MoeConfig(
            intermediate_size=width,
            moe_intermediate_size=width,
            num_experts=config.num_moe_experts,
            norm_topk_prob=True,
            **told,
        )
    return MixtralConfig(intermediate_size=width, num_local_experts=config.num_moe_experts, **told)
