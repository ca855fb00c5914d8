"""Norms, alone and in front of a linear layer as Transformer Engine fuses them: the names follow from that.

RMSNorm, or LayerNorm with a bias; of either, the stored weight may be what has to be added to one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.kernels.linear import linear
from ckptbridge.kernels.rms_norm import rms_norm
from ckptbridge.trainer.recompute import recomputed, remade


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, config: ModelConfig, backend: str) -> Tensor:
    """x [..., H] normed over its last dim, computed in fp32 whatever the dtype of x, in the dtype of x.

    A plain RMSNorm rounds before it multiplies by the weight, as Llama does; any other rounds once, at its end.
    """
    if is_plain_rms_norm(config):
        return rms_norm(x, weight, config.layernorm_epsilon, backend=backend)
    scale = weight.float() + 1 if config.layernorm_zero_centered_gamma else weight.float()
    if config.normalization == "RMSNorm":
        return F.rms_norm(x.float(), weight.shape, scale, config.layernorm_epsilon).to(x.dtype)
    shift = None if bias is None else bias.float()
    return F.layer_norm(x.float(), weight.shape, scale, shift, config.layernorm_epsilon).to(x.dtype)


def is_plain_rms_norm(config: ModelConfig) -> bool:
    """Whether the model's norm is Llama's: RMSNorm, and the stored weight is what rows are multiplied by."""
    return config.normalization == "RMSNorm" and not config.layernorm_zero_centered_gamma


def sum_and_norm(
    x: Tensor, pending: Tensor | None, weight: Tensor | None, bias: Tensor | None, config: ModelConfig, backend: str
) -> tuple[Tensor, Tensor]:
    """The residual stream x with what is `pending` added, and the norm of that sum (the sum, without a weight).

    A plain RMSNorm adds and norms in one pass.
    """
    if weight is None or pending is None or not is_plain_rms_norm(config):
        summed = x if pending is None else x + pending
        return summed, summed if weight is None else recomputed(norm, summed, weight, bias, config, backend)
    normed, summed = rms_norm(pending, weight, config.layernorm_epsilon, x, backend=backend)
    return summed, remade(normed, norm, summed, weight, bias, config, backend)


class Norm(nn.Module):
    """The model's norm over the last dim, of `size` channels: `weight` and, for LayerNorm, `bias`."""

    def __init__(self, size: int, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.config, self.backend = config, backend
        self.weight = nn.Parameter(torch.empty(size))
        self.register_parameter("bias", nn.Parameter(torch.empty(size)) if _has_bias(config) else None)

    def forward(self, x: Tensor) -> Tensor:
        return self.behind_sum(x, None)[1]

    def behind_sum(self, x: Tensor, pending: Tensor | None) -> tuple[Tensor, Tensor]:
        """x + pending, and the norm of that."""
        return sum_and_norm(x, pending, self.weight, self.bias, self.config, self.backend)


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
        return linear(normed, self.weight, self.bias)

    def normed(self, x: Tensor) -> Tensor:
        """What the linear layer sees."""
        return self.behind_sum(x, None)[1]

    def behind_sum(self, x: Tensor, pending: Tensor | None) -> tuple[Tensor, Tensor]:
        """x + pending, and what the linear layer sees of that."""
        return sum_and_norm(x, pending, self.layer_norm_weight, self.layer_norm_bias, self.config, self.backend)


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
        return linear(x, self.weight, self.bias)


def _has_bias(config: ModelConfig) -> bool:
    return config.normalization == "LayerNorm"
