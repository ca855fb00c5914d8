"""Experts that answer to the same tokens, found by their router's logits: agglomerative clustering, average linkage.

Shapes: T tokens, N experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def clusters_of(logits_TN: Tensor, count: int) -> Tensor:
    """The cluster of each expert, [N] int64, numbered in the order of each cluster's first expert.

    Two experts are as near as their logits over the text are correlated; an expert whose logits never change is near
    to none. The two nearest clusters become one until `count` are left.
    """
    centred_NT = (logits_TN.double() - logits_TN.double().mean(0)).T
    norms_N1 = centred_NT.square().sum(1, keepdim=True).sqrt()
    unit_NT = centred_NT / norms_N1.clamp_min(torch.finfo(torch.float64).tiny)
    distance_NN = 1 - unit_NT @ unit_NT.T
    distance_NN.fill_diagonal_(torch.inf)
    experts = len(distance_NN)
    cluster_N, sizes_N = torch.arange(experts), torch.ones(experts, dtype=torch.float64)
    for _ in range(experts - count):
        one, other = sorted(divmod(int(distance_NN.argmin()), experts))
        joint_N = (distance_NN[one] * sizes_N[one] + distance_NN[other] * sizes_N[other]) / (
            sizes_N[one] + sizes_N[other]
        )
        joint_N[one] = torch.inf
        distance_NN[one], distance_NN[:, one] = joint_N, joint_N
        distance_NN[other], distance_NN[:, other] = torch.inf, torch.inf
        sizes_N[one] += sizes_N[other]
        cluster_N[cluster_N == other] = one
    is_first_N = cluster_N == torch.arange(experts)
    return (is_first_N.cumsum(0) - 1)[cluster_N]
