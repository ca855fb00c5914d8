"""Which experts a token goes to, with which weights, and how evenly.

Shapes: T tokens, H hidden_size, E experts, K top-k, G groups of experts.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.kernels.backend import Backend
from ckptbridge.kernels.router_logits import router_logits
from ckptbridge.kernels.routing import Routes, ScoreFunction, route, routes_of_choice


class Router(nn.Module):
    """Scores every expert in fp32 and keeps the best K.

    `moe_router_pre_softmax` True: the weights are the softmax over all experts, as they are (Qwen's
    norm_topk_prob False). False: the softmax over the K chosen ones, so that they sum to one (Mixtral).
    The second is the first divided by its sum; the reference computes it so, and ties fall as they do in transformers.

    With sigmoid scores (DeepSeek-V3) the weights are the chosen scores, as they are or divided by their sum. The
    `expert_bias` of each expert helps to choose and weighs nothing. Where experts lie in groups, the choice is among
    those of the best groups. `moe_router_topk_scaling_factor` multiplies the weights at last.

    With `moe_router_sparse_mixer` it is PhiMoE's router as it is evaluated (training draws experts at random there).
    That one, and the choice among groups, are plain torch on every backend.
    """

    def __init__(self, config: ModelConfig, backend: Backend = "reference") -> None:
        super().__init__()
        self.backend: Backend = backend
        self.topk, self.pre_softmax = config.moe_router_topk, config.moe_router_pre_softmax
        experts = config.num_moe_experts or 0
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        self.register_parameter("bias", nn.Parameter(torch.empty(experts)) if config.add_router_bias else None)
        has_expert_bias = config.moe_router_enable_expert_bias
        expert_bias = nn.Parameter(torch.empty(experts), requires_grad=False) if has_expert_bias else None
        self.register_parameter("expert_bias", expert_bias)
        self.is_sigmoid = config.moe_router_score_function == "sigmoid"
        self.factor = config.moe_router_topk_scaling_factor
        self.near = 2 * config.moe_router_jitter if config.moe_router_sparse_mixer else None
        self.groups, self.best_groups = config.moe_router_num_groups, config.moe_router_group_topk
        self.experts_that_rank_a_group = 1 if config.moe_router_group_max else 2

    def logits(self, x_TH: Tensor) -> Tensor:
        """A number for each token and expert [T, E], in fp32."""
        return router_logits(x_TH, self.weight, self.bias, backend=self.backend)

    def forward(self, x_TH: Tensor) -> Routes:
        logits_TE = self.logits(x_TH)
        if self.near is not None:
            return _sparse_mixer(logits_TE, self.topk, self.near)
        function: ScoreFunction = "sigmoid" if self.is_sigmoid else "softmax"
        if self.groups is None:
            return route(
                logits_TE,
                self.expert_bias,
                topk=self.topk,
                score_function=function,
                pre_softmax=self.pre_softmax,
                scaling_factor=self.factor,
                backend=self.backend,
            )
        scores_TE = logits_TE.detach().sigmoid() if self.is_sigmoid else logits_TE.detach().softmax(-1)
        return routes_of_choice(
            logits_TE,
            self._ranks(scores_TE).topk(self.topk, dim=-1).indices,
            score_function=function,
            pre_softmax=self.pre_softmax,
            scaling_factor=self.factor,
        )

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


def _sparse_mixer(logits_TE: Tensor, topk: int, near: float) -> Routes:
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
    return replace(routes_of_choice(logits_TE, torch.cat(experts, -1)), weights_TK=torch.cat(weights, -1))


def load_balancing_loss(routes: Routes) -> Tensor:
    """How unevenly one layer's tokens are spread: E * sum over experts of f_e * P_e, a scalar.

    f_e is the fraction of the T*K choices that fell on expert e (dropped ones too), P_e the mean over tokens of the
    softmax over all experts. Perfect balance gives 1, everything on one expert up to E. This is Switch Transformer's
    loss as Megatron-Core computes it (`aux_loss`); the training loss gets moe_aux_loss_coeff times its sum over the
    layers, for each micro-batch, averaged over micro-batches. With an expert bias Megatron-Core counts the experts
    that would have been chosen without it, here those that were.

    Transformers' `load_balancing_loss_func` is another number: its f_e sums to K instead of 1, and it pools
    the counts and probabilities of all layers before it multiplies them, so on one layer it is K times this.
    """
    tokens, topk = routes.experts_TK.shape
    scale = len(routes.choices_E) / (tokens * topk * tokens)
    return torch.dot(routes.choices_E.to(routes.probability_sum_E.dtype), routes.probability_sum_E) * scale


def z_loss(routes: Routes) -> Tensor:
    """How large one layer's logits are: the mean over tokens of the square of their logsumexp, a scalar.

    ST-MoE's loss as Megatron-Core computes it (`moe_z_loss_coeff`); it is added like the load-balancing loss.
    """
    return routes.z_sum / len(routes.experts_TK)
