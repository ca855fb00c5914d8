"""Causal self-attention on Transformer Engine's modules, with the parameters of `trainer.attention.SelfAttention`.

Shapes: B batch, S sequence, H hidden_size, N heads, G query groups, P heads a group, D head dim, R channels that turn.
"""

from __future__ import annotations

import torch
import transformer_engine.pytorch as te
from torch import Tensor, nn
from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.trainer.rope import inverse_frequencies
from ckptbridge.trainer.transformer_engine.linear import Linear, NormLinear


class SelfAttention(nn.Module):
    """Norm and packed projection, norm of queries and keys, rotation, attention by cuDNN, projection back."""

    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__()
        self.config = config
        heads, groups, width = config.num_attention_heads, config.num_query_groups, config.kv_channels
        self.linear_qkv = NormLinear(config.hidden_size, (heads + 2 * groups) * width, config, bias=config.add_qkv_bias)
        if config.qk_layernorm:
            self.q_layernorm = te.RMSNorm(width, eps=config.layernorm_epsilon, device="meta")
            self.k_layernorm = te.RMSNorm(width, eps=config.layernorm_epsilon, device="meta")
        before = config.window_size - 1 if config.window_size is not None and config.has_window(number) else -1
        self.core_attention = te.DotProductAttention(
            heads,
            width,
            num_gqa_groups=groups,
            qkv_format="bshd",
            attn_mask_type="causal",
            window_size=(before, 0),
            softmax_scale=config.softmax_scale,
        )
        self.linear_proj = Linear(heads * width, config.hidden_size)

    def forward(self, x_BSH: Tensor, angles_S11R: Tensor) -> Tensor:
        """What attention adds to the residual stream, [B, S, H]."""
        config = self.config
        per_group = config.heads_per_group
        qkv = self.linear_qkv(x_BSH).unflatten(2, (config.num_query_groups, per_group + 2, config.kv_channels))
        q_BSGPD, k_BSG1D, v_BSG1D = qkv.split((per_group, 1, 1), dim=3)
        q_BSND, k_BSGD, v_BSGD = q_BSGPD.flatten(2, 3), k_BSG1D.squeeze(3), v_BSG1D.squeeze(3)
        if config.qk_layernorm:
            q_BSND, k_BSGD = self.q_layernorm(q_BSND.contiguous()), self.k_layernorm(k_BSGD.contiguous())
        q_BSND, k_BSGD = (
            apply_rotary_pos_emb(heads, angles_S11R, tensor_format="bshd", fused=True) for heads in (q_BSND, k_BSGD)
        )
        return self.linear_proj(self.core_attention(q_BSND, k_BSGD, v_BSGD.contiguous()))


def rotation_angles(config: ModelConfig, length: int, device: torch.device) -> Tensor:
    """Radians of positions [0, length) for each channel that turns, fp32 [S, 1, 1, R]; both halves are alike."""
    positions = torch.arange(length, device=device, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(config, length).to(device))
    return torch.cat((angles, angles), -1)[:, None, None]
