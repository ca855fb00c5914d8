"""Which experts a token goes to, with which weights, and how evenly.

Shapes: T tokens, H hidden_size, E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ckptbridge.converters.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class Routing:
    """The router's answer; all floating tensors are fp32."""

    experts_TK: Tensor
    weights_TK: Tensor
    probabilities_TE: Tensor


class Router(nn.Module):
    """Scores every expert in fp32 and keeps the best K.

    `moe_router_pre_softmax` True: the weights are the softmax over all experts, as they are (Qwen's
    norm_topk_prob False). False: the softmax over the K chosen ones, so that they sum to one (Mixtral).
    The second is the first divided by its sum; computed so, ties fall as they do in transformers.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.topk, self.pre_softmax = config.moe_router_topk, config.moe_router_pre_softmax
        self.weight = nn.Parameter(torch.empty(config.num_moe_experts or 0, config.hidden_size))

    def forward(self, x_TH: Tensor) -> Routing:
        probabilities = F.linear(x_TH.float(), self.weight.float()).softmax(-1)
        weights, experts = probabilities.topk(self.topk, dim=-1)
        if not self.pre_softmax:
            weights = weights / weights.sum(-1, keepdim=True)
        return Routing(experts, weights, probabilities)


def load_balancing_loss(probabilities_TE: Tensor, rows_E: Tensor) -> Tensor:
    """How unevenly one layer's tokens are spread: E * sum over experts of f_e * P_e, a scalar.

    f_e is the fraction of the T*K choices that fell on expert e, P_e the mean over tokens of the softmax over
    all experts. Perfect balance gives 1, everything on one expert up to E. This is Switch Transformer's loss as
    Megatron-Core computes it (`aux_loss`); the training loss gets moe_aux_loss_coeff times its sum over the
    layers, for each micro-batch, averaged over micro-batches.

    Transformers' `load_balancing_loss_func` is another number: its f_e sums to K instead of 1, and it pools
    the counts and probabilities of all layers before it multiplies them, so on one layer it is K times this.
    """
    tokens, experts = probabilities_TE.shape
    fraction_E = rows_E.to(probabilities_TE.dtype) / rows_E.sum()
    return experts * (fraction_E * probabilities_TE.sum(0) / tokens).sum()
