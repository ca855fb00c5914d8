"""Causal self-attention over grouped queries, in Megatron-Core's packed layout.

Shapes: B batch, S sequence, H hidden_size, N heads, G query groups, P heads a group, X = P + 2 with its key and value,
D head dim, R pairs of channels that turn.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.kernels.rope import MAX_HEAD_DIM, rotate, split_qkv
from ckptbridge.trainer.attention_kernels import AttentionKernels
from ckptbridge.trainer.norm import LinearNorm, Norm, NormLinear, is_plain_rms_norm
from ckptbridge.trainer.rope import rope_table


@dataclass(frozen=True, slots=True)
class Positions:
    """What every layer's attention needs to know of positions: computed once a forward pass."""

    cos_SR: Tensor
    sin_SR: Tensor
    local_cos_SR: Tensor
    """For layers with a window; the same tensor where they turn like the others."""
    local_sin_SR: Tensor
    window_SS: Tensor | None
    """True at [query, key] where a sliding window lets the query see the key; None when causal order is all."""


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # a training run may be next to read them
def positions(config: ModelConfig, length: int, device: torch.device, dtype: torch.dtype) -> Positions:
    """Positions [0, length) of a model; the window's mask only where the window is shorter than the sequence.

    Kept from call to call: they come from the host, which no CUDA graph can repeat. Nobody may write into them.
    """
    cos, sin = rope_table(config, length, device, dtype)
    is_local_other = config.local_rotary_base is not None
    local = rope_table(config, length, device, dtype, is_local=True) if is_local_other else (cos, sin)
    if config.window_size is None or config.window_size >= length:
        return Positions(cos, sin, *local, None)
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return Positions(cos, sin, *local, (distance >= 0) & (distance < config.window_size))


class SelfAttention(nn.Module):
    """Norm, one product for queries, keys and values, rotation, attention, output projection.

    Rows of `linear_qkv.weight` lie group by group: the group's N/G query heads, its key head, its value head.
    `number` is the layer's: some models have a window in some layers only.
    """

    def __init__(self, config: ModelConfig, number: int, backend: str) -> None:
        super().__init__()
        self.config, self.backend, self.has_window = config, backend, config.has_window(number)
        self.splits_at_once = _splits_at_once(config)
        rows = (config.num_attention_heads + 2 * config.num_query_groups) * config.kv_channels
        self.linear_qkv = NormLinear(config.hidden_size, rows, config, backend, bias=config.add_qkv_bias)
        if config.qk_layernorm:
            heads = (config.num_attention_heads, config.num_query_groups) if config.qk_layernorm_whole else (1, 1)
            self.q_layernorm = Norm(heads[0] * config.kv_channels, config, backend)
            self.k_layernorm = Norm(heads[1] * config.kv_channels, config, backend)
        self.core_attention = CoreAttention(config)
        self.linear_proj = LinearNorm(
            config.num_attention_heads * config.kv_channels,
            config.hidden_size,
            config,
            backend,
            bias=config.add_proj_bias,
        )

    def forward(self, normed_BSH: Tensor, where: Positions) -> Tensor:
        """What attention adds to the residual stream, [B, S, H], of what the norm of `linear_qkv` gave."""
        config = self.config
        heads = (config.num_query_groups, config.heads_per_group + 2, config.kv_channels)
        qkv_BSGXD = self.linear_qkv.product(normed_BSH).unflatten(2, heads)
        cos_SR, sin_SR = where.cos_SR, where.sin_SR
        if self.has_window:
            cos_SR, sin_SR = where.local_cos_SR, where.local_sin_SR
        q_BSND, k_BSGD, v_BSGD = self._split(qkv_BSGXD, cos_SR, sin_SR)
        out_BNSD = self.core_attention(
            q_BSND.transpose(1, 2),
            k_BSGD.transpose(1, 2),
            v_BSGD.transpose(1, 2),
            where.window_SS if self.has_window else None,
        )
        return self.linear_proj(out_BNSD.transpose(1, 2).flatten(2))

    def _split(self, qkv_BSGXD: Tensor, cos_SR: Tensor, sin_SR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, normed and turned, and values."""
        config = self.config
        if self.splits_at_once:
            weights = (self.q_layernorm.weight, self.k_layernorm.weight) if config.qk_layernorm else (None, None)
            return split_qkv(qkv_BSGXD, cos_SR, sin_SR, *weights, config.layernorm_epsilon, backend=self.backend)
        q, k, v = qkv_BSGXD.split((config.heads_per_group, 1, 1), dim=3)
        q_BSND, k_BSGD, v_BSGD = q.flatten(2, 3), k.squeeze(3), v.squeeze(3)
        if config.qk_layernorm and config.qk_layernorm_whole:
            # With one group they are views of the packed rows still.
            q_BSND = self.q_layernorm(q_BSND.flatten(2).contiguous()).view(q_BSND.shape)
            k_BSGD = self.k_layernorm(k_BSGD.flatten(2).contiguous()).view(k_BSGD.shape)
        elif config.qk_layernorm:
            q_BSND, k_BSGD = self.q_layernorm(q_BSND.contiguous()), self.k_layernorm(k_BSGD.contiguous())
        cos, sin = cos_SR[:, None], sin_SR[:, None]
        return rotate(q_BSND, cos, sin), rotate(k_BSGD, cos, sin), v_BSGD


def _splits_at_once(config: ModelConfig) -> bool:
    """Whether one kernel norms and turns: no norm, or Llama's RMSNorm of each head."""
    turns = 2 <= config.rotary_dim <= config.kv_channels <= MAX_HEAD_DIM and config.rotary_dim % 2 == 0
    return turns and (not config.qk_layernorm or (not config.qk_layernorm_whole and is_plain_rms_norm(config)))


class CoreAttention(nn.Module):
    """Scores, their softmax, and the values it weighs.

    With sinks the parameter `softmax_offset` [N] holds one more score for each head: it joins the softmax, and
    what it gets goes to no value.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.scale, self.cap = config.softmax_scale, config.attn_logit_softcapping
        self.kernels = AttentionKernels()
        learnable = config.softmax_type == "learnable"
        self.register_parameter(
            "softmax_offset", nn.Parameter(torch.empty(config.num_attention_heads)) if learnable else None
        )

    def forward(self, q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, window_SS: Tensor | None) -> Tensor:
        """Causal attention [B, N, S, D of the values]; `window_SS` is True where a query sees a key."""
        if self.softmax_offset is None and self.cap is None and window_SS is None:
            return self.kernels.causal(q_BNSD, k_BGSD, v_BGSD, self.scale)
        if self.softmax_offset is None and self.cap is None:
            heads = q_BNSD.shape[1] // k_BGSD.shape[1]
            if q_BNSD.is_cuda and heads > 1:
                # With a mask and fewer keys than queries torch 2.11 has the definition alone, which keeps all scores in
                # fp32: at 4,096 tokens and 32 heads 2 GiB a layer, for which two copies are little.
                k_BGSD, v_BGSD = (x.repeat_interleave(heads, dim=1) for x in (k_BGSD, v_BGSD))
            return F.scaled_dot_product_attention(
                q_BNSD,
                k_BGSD,
                v_BGSD,
                attn_mask=window_SS,
                scale=self.scale,
                enable_gqa=q_BNSD.shape[1] > k_BGSD.shape[1],
            )
        groups, length, width = k_BGSD.shape[1:]
        q_BGPSD = q_BNSD.unflatten(1, (groups, -1))
        scale = width**-0.5 if self.scale is None else self.scale
        scores = torch.matmul(q_BGPSD, k_BGSD[:, :, None].transpose(-1, -2)).float() * scale
        if self.cap is not None:
            scores = torch.tanh(scores / self.cap) * self.cap
        if window_SS is None:
            window_SS = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~window_SS, float("-inf"))
        if self.softmax_offset is not None:
            sinks = self.softmax_offset.float().view(groups, -1, 1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat((scores, sinks), -1)
        weights_BGPSS = scores.softmax(-1)[..., :length].to(v_BGSD.dtype)
        return torch.matmul(weights_BGPSS, v_BGSD[:, :, None]).flatten(1, 2)


def use_attention(decoder: nn.Module, kernels: AttentionKernels) -> None:
    """From now on the decoder's causal attention is computed by `kernels`.

    Layers with a window, sinks or a cap have the one way there is.
    """
    for module in decoder.modules():
        if isinstance(getattr(module, "kernels", None), AttentionKernels):
            module.kernels = kernels  # type: ignore[assignment]
