"""Transformer Engine's linear layers under this decoder's names, their gradients summed where the optimizer wants.

A weight with a main gradient gets Transformer Engine's `main_grad`: the fp32 memory that its product writes into.

Shapes: R routed rows, E experts, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import transformer_engine.pytorch as te
from torch import Tensor, nn

from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.kernels.main_gradient import main_gradient_of


class NormLinear(te.LayerNormLinear):
    """RMSNorm and a linear layer, `trainer.norm.NormLinear`'s parameters: `layer_norm_weight`, `weight`, `bias`."""

    def __init__(self, inputs: int, outputs: int, config: ModelConfig, *, bias: bool = False) -> None:
        epsilon = config.layernorm_epsilon
        super().__init__(inputs, outputs, eps=epsilon, bias=bias, normalization="RMSNorm", device="meta")

    def forward(self, x: Tensor) -> Tensor:
        self.fuse_wgrad_accumulation = _sums_into_main_gradient(self.weight, [self.weight])
        return super().forward(x)


class Linear(te.Linear):
    """A linear layer without a bias: `weight`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        self.fuse_wgrad_accumulation = _sums_into_main_gradient(self.weight, [self.weight])
        return super().forward(x)


class GroupedLinear(te.GroupedLinear):
    """One matrix an expert, stacked in a single parameter as checkpoints have them: `weight` [E, O, I].

    Transformer Engine wants a tensor an expert. They are views of the stacked one; while gradients go to the main
    gradient, views that autograd does not trace, since nothing comes back through them.
    """

    def __init__(self, experts: int, outputs: int, inputs: int) -> None:
        super().__init__(experts, inputs, outputs, bias=False, device="meta")
        for expert in range(experts):
            delattr(self, f"weight{expert}")
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs, device="meta"))
        self._views: list[Tensor] = []

    def forward(self, x_RI: Tensor, rows_E: list[int]) -> Tensor:
        """The first rows_E[0] rows through expert 0's matrix, the next rows_E[1] through expert 1's: [R, O]."""
        views = [view.requires_grad_(self.weight.requires_grad) for view in self.weight.detach().unbind(0)]
        self.fuse_wgrad_accumulation = _sums_into_main_gradient(self.weight, views)
        # Kept here: Transformer Engine's backward pass refers to them weakly.
        self._views = views if self.fuse_wgrad_accumulation else list(self.weight.unbind(0))
        return super().forward(x_RI, rows_E)

    def _get_weight_tensors(self) -> list[Tensor]:
        return self._views

    def _get_bias_tensors(self) -> list[Tensor]:
        # Those that stand for no bias were made on the meta device, which no kernel takes.
        return [self.weight.new_empty(0)] * self.num_gemms


def _sums_into_main_gradient(weight: Tensor, parts: list[Tensor]) -> bool:
    """Tell Transformer Engine where the gradient of `weight` goes, part by part; False if autograd is to keep it."""
    main = main_gradient_of(weight)
    if main is None or not (weight.requires_grad and torch.is_grad_enabled()):
        return False
    memory, accumulate = main.target()
    for part, target in zip(parts, [memory] if parts[0] is weight else memory.unbind(0), strict=True):
        part.main_grad, part.overwrite_main_grad = target, not accumulate  # type: ignore[attr-defined]
    return True
