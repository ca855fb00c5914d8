"""RMSNorm, alone and in front of a linear layer as Transformer Engine fuses them: the names follow from that."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ckptbridge.kernels.rms_norm import rms_norm


class Norm(nn.Module):
    """RMSNorm over the last dim: the mean square and the division in fp32, whatever the dtype of the input."""

    def __init__(self, size: int, epsilon: float, backend: str) -> None:
        super().__init__()
        self.epsilon, self.backend = epsilon, backend
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.epsilon, backend=self.backend)


class NormLinear(nn.Module):
    """RMSNorm and then a linear layer: parameters `layer_norm_weight`, `weight` and, if asked, `bias`."""

    def __init__(self, inputs: int, outputs: int, epsilon: float, backend: str, *, bias: bool = False) -> None:
        super().__init__()
        self.epsilon, self.backend = epsilon, backend
        self.layer_norm_weight = nn.Parameter(torch.empty(inputs))
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.register_parameter("bias", nn.Parameter(torch.empty(outputs)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        normed = rms_norm(x, self.layer_norm_weight, self.epsilon, backend=self.backend)
        return F.linear(normed, self.weight, self.bias)
