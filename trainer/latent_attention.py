"""Multi-head latent attention as DeepSeek has it, in Megatron-Core's names and Hugging Face's order of rows.

Shapes: B batch, S sequence, H hidden_size, N heads, R channels of a head that turn with the position.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.rope_scaling import YarnRopeScaling
from ckptbridge.kernels.rope import rotate
from ckptbridge.trainer.attention import Positions
from ckptbridge.trainer.attention_kernels import AttentionKernels
from ckptbridge.trainer.linear import Linear
from ckptbridge.trainer.norm import NormLinear
from ckptbridge.trainer.rope import magnitude


class LatentAttention(nn.Module):
    """Keys and values from a small normed latent, queries from another or from the hidden state itself.

    A head is `qk_head_dim` channels without position and `qk_pos_emb_head_dim` that turn; of keys, all heads share
    those that turn, which come straight from the hidden state. The norm before it belongs to the layer.
    """

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.config = config
        heads, still, turned = config.num_attention_heads, config.qk_head_dim or 0, config.qk_pos_emb_head_dim or 0
        latent, value = config.kv_lora_rank or 0, config.v_head_dim or 0
        self.widths = (still, turned, value)
        self.kernels = AttentionKernels()
        if config.q_lora_rank is None:
            self.linear_q_proj = Linear(config.hidden_size, heads * config.kv_channels, bias=False)
        else:
            self.linear_q_down_proj = Linear(config.hidden_size, config.q_lora_rank, bias=False)
            self.linear_q_up_proj = NormLinear(config.q_lora_rank, heads * config.kv_channels, config, backend)
        self.linear_kv_down_proj = Linear(config.hidden_size, latent + turned, bias=False)
        self.linear_kv_up_proj = NormLinear(latent, heads * (still + value), config, backend)
        self.linear_proj = Linear(heads * value, config.hidden_size, bias=False)

    def forward(self, x_BSH: Tensor, where: Positions) -> Tensor:
        """What attention adds to the residual stream, [B, S, H], of a normed x."""
        config, (still, turned, value) = self.config, self.widths
        if config.q_lora_rank is None:
            q = self.linear_q_proj(x_BSH)
        else:
            q = self.linear_q_up_proj(self.linear_q_down_proj(x_BSH))
        q_still, q_turned = q.unflatten(2, (-1, still + turned)).transpose(1, 2).split((still, turned), dim=-1)
        latent, k_turned = self.linear_kv_down_proj(x_BSH).split((config.kv_lora_rank or 0, turned), dim=-1)
        kv = self.linear_kv_up_proj(latent.contiguous()).unflatten(2, (-1, still + value)).transpose(1, 2)
        k_still, v_BNSD = kv.split((still, value), dim=-1)
        q_BNSR = rotate(_pairs_apart(q_turned), where.cos_SR, where.sin_SR)
        k_B1SR = rotate(_pairs_apart(k_turned[:, None]), where.cos_SR, where.sin_SR)
        out_BNSD = self.kernels.causal(
            torch.cat((q_still, q_BNSR), -1),
            torch.cat((k_still, k_B1SR.expand(-1, k_still.shape[1], -1, -1)), -1),
            v_BNSD,
            softmax_scale(config),
        )
        return self.linear_proj(out_BNSD.transpose(1, 2).flatten(2))


def softmax_scale(config: ModelConfig) -> float:
    """What scores are multiplied by: YaRN's `mscale_all_dim` stretches them with the context."""
    scale = config.kv_channels**-0.5
    scaling = config.rope_scaling
    if isinstance(scaling, YarnRopeScaling) and scaling.mscale_all_dim:
        scale *= magnitude(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale


def _pairs_apart(x: Tensor) -> Tensor:
    """Channels 0 2 4 ... 1 3 5 ...: DeepSeek turns neighbours against each other, `rotate` the two halves.

    The order of channels is the same in queries and keys, so that scores do not change.
    """
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
