"""Causal self-attention over grouped queries, in Megatron-Core's packed layout.

Shapes: B batch, S sequence, H hidden_size, N heads, G query groups, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.trainer.norm import Norm, NormLinear
from ckptbridge.trainer.rope import rope_table, rotate


@dataclass(frozen=True, slots=True)
class Positions:
    """What every layer's attention needs to know of positions: computed once a forward pass."""

    cos_SD: Tensor
    sin_SD: Tensor
    window_SS: Tensor | None
    """True at [query, key] where a sliding window lets the query see the key; None when causal order is all."""


def positions(config: ModelConfig, length: int, device: torch.device, dtype: torch.dtype) -> Positions:
    """Positions [0, length) of a model; the window's mask only where the window is shorter than the sequence."""
    cos, sin = rope_table(config, length, device, dtype)
    if config.window_size is None or config.window_size >= length:
        return Positions(cos, sin, None)
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return Positions(cos, sin, (distance >= 0) & (distance < config.window_size))


class SelfAttention(nn.Module):
    """Norm, one product for queries, keys and values, rotation, attention, output projection.

    Rows of `linear_qkv.weight` lie group by group: the group's N/G query heads, its key head, its value head.
    """

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.config = config
        rows = (config.num_attention_heads + 2 * config.num_query_groups) * config.kv_channels
        self.linear_qkv = NormLinear(
            config.hidden_size, rows, config.layernorm_epsilon, backend, bias=config.add_qkv_bias
        )
        if config.qk_layernorm:
            self.q_layernorm = Norm(config.kv_channels, config.layernorm_epsilon, backend)
            self.k_layernorm = Norm(config.kv_channels, config.layernorm_epsilon, backend)
        self.linear_proj = nn.Linear(config.num_attention_heads * config.kv_channels, config.hidden_size, bias=False)

    def forward(self, x_BSH: Tensor, where: Positions) -> Tensor:
        """What attention adds to the residual stream, [B, S, H]; the norm before it is applied here."""
        config = self.config
        per_group = config.heads_per_group
        qkv = self.linear_qkv(x_BSH).unflatten(2, (config.num_query_groups, per_group + 2, config.kv_channels))
        q, k, v = qkv.split((per_group, 1, 1), dim=3)
        q, k, v = q.flatten(2, 3), k.squeeze(3), v.squeeze(3)
        if config.qk_layernorm:
            q, k = self.q_layernorm(q.contiguous()), self.k_layernorm(k.contiguous())
        out_BNSD = F.scaled_dot_product_attention(
            rotate(q.transpose(1, 2), where.cos_SD, where.sin_SD),
            rotate(k.transpose(1, 2), where.cos_SD, where.sin_SD),
            v.transpose(1, 2),
            attn_mask=where.window_SS,
            is_causal=where.window_SS is None,
            enable_gqa=per_group > 1,
        )
        return self.linear_proj(out_BNSD.transpose(1, 2).flatten(2))
