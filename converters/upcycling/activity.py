"""How much each neuron of a dense MLP does on a text, and which neurons nearly every token needs.

What a neuron adds to the output is its activation times its column of down_proj. Its size, the product of the two
norms, does not change when up_proj is multiplied by a number that down_proj is divided by, the activation's does.
Shapes: T tokens, F dense width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ckptbridge.converters.upcycling.measured import MlpSample
from ckptbridge.converters.upcycling.neuron_sums import NeuronSums
from ckptbridge.converters.upcycling.neurons import DenseMlp

ACTIVE_SHARE = 0.1
"""A neuron is active for a token when it is among this share of the neurons that add most to the token's output."""


def sizes(sample: MlpSample, mlp: DenseMlp) -> Tensor:
    """The size of what each neuron adds to each token's output, [T, F] in fp32."""
    return sample.hidden_TF.abs() * NeuronSums(mlp).norms("down").float()


def active(sizes_TF: Tensor) -> Tensor:
    """Whether each neuron is active for each token, [T, F] bool: CMoE's ATopK (arXiv 2502.04416)."""
    count = max(1, round(sizes_TF.shape[1] * ACTIVE_SHARE))
    is_active_TF = torch.zeros(sizes_TF.shape, dtype=torch.bool)
    return is_active_TF.scatter_(1, sizes_TF.topk(count, dim=1).indices, True)


def most_active(is_active_TF: Tensor, sizes_TF: Tensor, count: int) -> Tensor:
    """The numbers, ascending, of the `count` neurons that are active most often; of equals those that add more."""
    rate_F = is_active_TF.sum(0).double()
    mean_F = sizes_TF.double().mean(0)
    order = (rate_F + mean_F / (2 * mean_F.max() + torch.finfo(torch.float64).tiny)).argsort(descending=True)
    return order[:count].sort().values
