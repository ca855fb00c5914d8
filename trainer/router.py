"""Which experts a token goes to, with which weights, and how evenly.

Shapes: T tokens, H hidden_size, E experts, K top-k, G groups of experts.
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

    With sigmoid scores (DeepSeek-V3) the weights are the chosen scores, as they are or divided by their sum. The
    `expert_bias` of each expert helps to choose and weighs nothing. Where experts lie in groups, the choice is among
    those of the best groups. `moe_router_topk_scaling_factor` multiplies the weights at last.

    With `moe_router_sparse_mixer` it is PhiMoE's router as it is evaluated (training draws experts at random there).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.topk, self.pre_softmax = config.moe_router_topk, config.moe_router_pre_softmax
        experts = config.num_moe_experts or 0
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        self.register_parameter("bias", nn.Parameter(torch.empty(experts)) if config.add_router_bias else None)
        has_expert_bias = config.moe_router_enable_expert_bias
        self.register_parameter("expert_bias", nn.Parameter(torch.empty(experts)) if has_expert_bias else None)
        self.is_sigmoid = config.moe_router_score_function == "sigmoid"
        self.factor = config.moe_router_topk_scaling_factor
        self.near = 2 * config.moe_router_jitter if config.moe_router_sparse_mixer else None
        self.groups, self.best_groups = config.moe_router_num_groups, config.moe_router_group_topk
        self.experts_that_rank_a_group = 1 if config.moe_router_group_max else 2

    def logits(self, x_TH: Tensor) -> Tensor:
        """A number for each token and expert [T, E], in fp32."""
        return F.linear(x_TH.float(), self.weight.float(), None if self.bias is None else self.bias.float())

    def forward(self, x_TH: Tensor) -> Routing:
        logits_TE = self.logits(x_TH)
        if self.near is not None:
            return _sparse_mixer(logits_TE, self.topk, self.near)
        scores_TE = logits_TE.sigmoid() if self.is_sigmoid else logits_TE.softmax(-1)
        if self.expert_bias is None and self.groups is None:
            weights, experts = scores_TE.topk(self.topk, dim=-1)
        else:
            experts = self._ranks(scores_TE.detach()).topk(self.topk, dim=-1).indices
            weights = scores_TE.gather(-1, experts)
        if not self.pre_softmax:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # of sigmoids all may be zero
        if self.factor is not None:
            weights = weights * self.factor
        probabilities_TE = scores_TE / scores_TE.sum(-1, keepdim=True) if self.is_sigmoid else scores_TE
        return Routing(experts, weights, probabilities_TE)

    def _ranks(self, scores_TE: Tensor) -> Tensor:
        """What experts are chosen by: minus infinity outside the best groups."""
        if self.expert_bias is not None:
            scores_TE = scores_TE + self.expert_bias.float()
        if self.groups is None or self.best_groups is None:
            return scores_TE
        groups_TGE = scores_TE.unflatten(-1, (self.groups, -1))
        groups_TG = groups_TGE.topk(self.experts_that_rank_a_group, dim=-1).values.sum(-1)
        is_out_TG = torch.ones_like(groups_TG, dtype=torch.bool)
        is_out_TG.scatter_(-1, groups_TG.topk(self.best_groups, dim=-1).indices, False)
        return groups_TGE.masked_fill(is_out_TG[..., None], float("-inf")).flatten(-2)


def _sparse_mixer(logits_TE: Tensor, topk: int, near: float) -> Routing:
    """The best expert, then the best of the rest, each weighed by a softmax over what is about as good as it.

    About as good is a logit that is less than the best by no more than `near` of the larger of their sizes.
    """
    left_TE, weights, experts = logits_TE, list[Tensor](), list[Tensor]()
    for _ in range(topk):
        best_T1, expert_T1 = left_TE.max(-1, keepdim=True)
        size_TE = torch.maximum(logits_TE.detach().abs(), best_T1.detach())
        is_far_TE = (best_T1 - logits_TE).detach() / size_TE > near
        weights.append(left_TE.masked_fill(is_far_TE, float("-inf")).softmax(-1).gather(-1, expert_T1))
        experts.append(expert_T1)
        left_TE = left_TE.scatter(-1, expert_T1, float("-inf"))
    return Routing(torch.cat(experts, -1), torch.cat(weights, -1), logits_TE.softmax(-1))


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
