"""Routers for experts that were carved out of an MLP: linear, and made without training.

CMoE (arXiv 2502.04416) takes the neuron that stands best for each cluster and routes by how active it is,
|silu(g) * u|, which no class of a mixture computes: their routers are linear. Two linear ones stand for it.
`representative_rows` are the neurons' own rows of gate_proj, since silu lets a neuron act where its g is large.
`fitted_rows` are the least-squares prediction, from what the router sees, of how much an expert adds to a token's
output; on SmolLM2 they are the better ones by far.
The rows are scaled together, so that the logits of one token spread little: the chosen experts then have nearly the
same weight, as in the dense MLP.
Shapes: T tokens, H hidden_size, F dense width, R neurons of an expert, N experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ckptbridge.converters.upcycling.activity import active
from ckptbridge.converters.upcycling.carving import evenly
from ckptbridge.converters.upcycling.neurons import DenseMlp, Neurons

MOST_TOKENS = 4096
"""The rows are fitted on so many tokens, taken evenly from the sample."""
SPREAD = 0.03
"""Standard deviation of a token's logits, where none is asked for."""
_RIDGE = 0.01
"""What is added to the diagonal of the inputs' second moments, as a share of its mean."""


def representative_rows(
    sizes_TF: Tensor, experts: Sequence[Neurons], mlp: DenseMlp, input_TH: Tensor, std: float | None
) -> Tensor:
    """The rows [N, H] of gate_proj (without a gate: of up_proj) of the neuron that stands for each expert.

    It is the one whose activity has the smallest angle to the mean of the expert's neurons. (The nearest one would be
    the most silent one where each neuron is active for few tokens.)
    """
    is_active_TF = active(sizes_TF).float()
    rows: list[Tensor] = []
    for neurons in experts:
        numbers = _numbers(neurons)
        activity_TR = is_active_TF[:, numbers]
        alike_R = activity_TR.mean(1) @ activity_TR / activity_TR.sum(0).sqrt().clamp_min(1)
        neuron = int(numbers[int(alike_R.argmax())])
        rows.append(mlp.fc1.read_rows(neuron, neuron + 1).float())
    return _spread(torch.cat(rows), input_TH, std)


def fitted_rows(sizes_TF: Tensor, experts: Sequence[Neurons], input_TH: Tensor, std: float | None) -> Tensor:
    """The rows [N, H] that predict best the logarithm of what each expert adds, by ridge regression."""
    tokens = evenly(torch.arange(len(input_TH)), MOST_TOKENS)
    added = [sizes_TF[tokens][:, _numbers(neurons)].square().sum(1).sqrt() for neurons in experts]
    added_TN = torch.stack(added, 1).double()
    wanted_TN = added_TN.clamp_min(float(added_TN.mean()) * 1e-6 + torch.finfo(torch.float64).tiny).log()
    x_TH = input_TH[tokens].double()
    ridge = max(_RIDGE * float(x_TH.square().sum(0).mean()), torch.finfo(torch.float64).tiny)
    if len(x_TH) < x_TH.shape[1]:  # the same rows out of the smaller of two systems
        moments_TT = x_TH @ x_TH.T
        moments_TT.diagonal().add_(ridge)
        rows_HN = x_TH.T @ _solved(moments_TT, wanted_TN)
    else:
        moments_HH = x_TH.T @ x_TH
        moments_HH.diagonal().add_(ridge)
        rows_HN = _solved(moments_HH, x_TH.T @ wanted_TN)
    rows_HN = rows_HN - rows_HN.mean(1, keepdim=True)  # what all experts have in common chooses none of them
    return _spread(rows_HN.T.float(), input_TH, std)


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    """The solution of a positive definite system."""
    lower = cast(Tensor, torch.linalg.cholesky(matrix))
    return torch.cholesky_solve(right, lower)


def _spread(rows_NH: Tensor, input_TH: Tensor, std: float | None) -> Tensor:
    """The rows times one number: to the root mean square `std`; with None until the logits spread by SPREAD."""
    if std is not None:
        found, wanted = rows_NH.square().mean().sqrt(), std
    else:
        logits_TN = input_TH @ rows_NH.T
        found, wanted = (logits_TN - logits_TN.mean(1, keepdim=True)).square().mean().sqrt(), SPREAD
    return rows_NH * (wanted / max(float(found), torch.finfo(torch.float32).tiny))


def _numbers(neurons: Neurons) -> Tensor:
    return torch.arange(neurons.start, neurons.stop) if isinstance(neurons, range) else neurons
