"""What the experts' outputs have to be multiplied by on real activations, beside what the formula says.

The factor is the least-squares one: <y, d> / <y, y> for what the routed experts give and what they ought to give,
each token measured by the size of its d, so that a few tokens of enormous outputs do not decide for all.
Softmax weights that are not divided by their sum are larger than 1/N once the router is not zero; and the experts of
a partition are not alike: LLaMA-MoE's N/T is right if the experts that a token does not meet would have given what
those do that it meets, which is far from what trained ones do.
Shapes: T tokens, H hidden_size, F dense width, N experts, R output rows at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ckptbridge.converters.upcycling.carving import evenly
from ckptbridge.converters.upcycling.factors import output_scale
from ckptbridge.converters.upcycling.measured import MlpSample
from ckptbridge.converters.upcycling.neurons import DenseMlp
from ckptbridge.converters.upcycling.partition import Partition
from ckptbridge.converters.upcycling.spec import UpcycleSpec

MOST_TOKENS = 1024
"""The factor is fitted on so many tokens, taken evenly from the sample."""
_ROWS = 1024


def fitted_scale(spec: UpcycleSpec, sample: MlpSample, mlp: DenseMlp, cut: Partition, router_NH: Tensor) -> float:
    """What to multiply s by for a resolved spec with these neurons and this router; 1 where no factor is wanted."""
    if spec.scaling == "none":
        return 1.0
    tokens = evenly(torch.arange(len(sample.input_TH)), MOST_TOKENS)
    hidden_TF = sample.hidden_TF[tokens]
    weights_TN = routing_weights(spec, sample.input_TH[tokens], router_NH) * output_scale(spec)
    met_TF = torch.zeros_like(hidden_TF)
    for number in range(spec.num_experts):
        group, shard = divmod(number, spec.granularity)
        neurons = cut.groups[group][shard]
        part = slice(neurons.start, neurons.stop) if isinstance(neurons, range) else neurons
        met_TF[:, part] += weights_TN[:, number, None]
    met_TF *= hidden_TF
    wanted_TF = hidden_TF
    if spec.shared == "partition" and cut.shared is not None:
        shared = torch.arange(cut.shared.start, cut.shared.stop) if isinstance(cut.shared, range) else cut.shared
        wanted_TF = hidden_TF.index_fill(1, shared, 0.0)
    both_T, made_T, wanted_T = torch.zeros(3, len(tokens), dtype=torch.float64)
    for start in range(0, mlp.fc2.shape[0], _ROWS):
        down_RF = mlp.fc2.read_rows(start, min(start + _ROWS, mlp.fc2.shape[0])).float()
        made_TR, wanted_TR = (met_TF @ down_RF.T).double(), (wanted_TF @ down_RF.T).double()
        both_T += (made_TR * wanted_TR).sum(1)
        made_T += made_TR.square().sum(1)
        wanted_T += wanted_TR.square().sum(1)
    counts_T = (wanted_T > 0) & (made_T > 0)
    squares = float((made_T / wanted_T)[counts_T].sum())
    return float((both_T / wanted_T)[counts_T].sum()) / squares if squares else 1.0


def routing_weights(spec: UpcycleSpec, input_TH: Tensor, router_NH: Tensor) -> Tensor:
    """The weight of each expert for each token, [T, N], before any scaling factor; zero for those not chosen."""
    logits_TN = input_TH @ router_NH.float().T
    scores_TN = logits_TN.sigmoid() if spec.router == "sigmoid" else logits_TN.softmax(-1)
    weights_TK, experts_TK = scores_TN.topk(spec.chosen, dim=-1)
    if spec.router != "pre-softmax":
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return torch.zeros_like(scores_TN).scatter(-1, experts_TK, weights_TK)
