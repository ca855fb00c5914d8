"""Norms, alone and in front of a linear layer as Transformer Engine fuses them: the names follow from that.

RMSNorm, or LayerNorm with a bias; of either, the stored weight may be what has to be added to one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.kernels.rms_norm import rms_norm


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, config: ModelConfig, backend: str) -> Tensor:
    """x [..., H] normed over its last dim, computed in fp32 whatever the dtype of x, in the dtype of x.

    A plain RMSNorm rounds before it multiplies by the weight, as Llama does; any other rounds once, at its end.
    """
    if config.normalization == "RMSNorm" and not config.layernorm_zero_centered_gamma:
        return rms_norm(x, weight, config.layernorm_epsilon, backend=backend)
    scale = weight.float() + 1 if config.layernorm_zero_centered_gamma else weight.float()
    if config.normalization == "RMSNorm":
        return F.rms_norm(x.float(), weight.shape, scale, config.layernorm_epsilon).to(x.dtype)
    shift = None if bias is None else bias.float()
    return F.layer_norm(x.float(), weight.shape, scale, shift, config.layernorm_epsilon).to(x.dtype)


class Norm(nn.Module):
    """The model's norm over the last dim, of `size` channels: `weight` and, for LayerNorm, `bias`."""

    def __init__(self, size: int, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.config, self.backend = config, backend
        self.weight = nn.Parameter(torch.empty(size))
        self.register_parameter("bias", nn.Parameter(torch.empty(size)) if _has_bias(config) else None)

    def forward(self, x: Tensor) -> Tensor:
        return norm(x, self.weight, self.bias, self.config, self.backend)


class NormLinear(nn.Module):
    """A norm and then a linear layer: `layer_norm_weight`, for LayerNorm `layer_norm_bias`, `weight`, if asked `bias`.

    Without `pre_layernorm` it is the linear layer alone.
    """

    def __init__(self, inputs: int, outputs: int, config: ModelConfig, backend: str, *, bias: bool = False) -> None:
        super().__init__()
        self.config, self.backend = config, backend
        has_norm = config.pre_layernorm
        self.register_parameter("layer_norm_weight", nn.Parameter(torch.empty(inputs)) if has_norm else None)
        has_shift = has_norm and _has_bias(config)
        self.register_parameter("layer_norm_bias", nn.Parameter(torch.empty(inputs)) if has_shift else None)
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.register_parameter("bias", nn.Parameter(torch.empty(outputs)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self.normed(x))

    def product(self, normed: Tensor) -> Tensor:
        """The linear layer alone."""
        return F.linear(normed, self.weight, self.bias)

    def normed(self, x: Tensor) -> Tensor:
        """What the linear layer sees."""
        if self.layer_norm_weight is None:
            return x
        return norm(x, self.layer_norm_weight, self.layer_norm_bias, self.config, self.backend)


class LinearNorm(nn.Linear):
    """A linear layer back into the residual stream and, with `post_layernorm`, a norm of what it adds there."""

    def __init__(self, inputs: int, outputs: int, config: ModelConfig, backend: str, *, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.post_layernorm = Norm(outputs, config, backend) if config.post_layernorm else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.product(x)
        return out if self.post_layernorm is None else self.post_layernorm(out)

    def product(self, x: Tensor) -> Tensor:
        """The linear layer alone."""
        return F.linear(x, self.weight, self.bias)


def _has_bias(config: ModelConfig) -> bool:
    return config.normalization == "LayerNorm"
