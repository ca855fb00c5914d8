"""The load-balancing loss and the z-loss against naive loops; how the first differs from the one of transformers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from ckptbridge.kernels.routing import Routes, route, routes_of_choice
from ckptbridge.trainer.router import load_balancing_loss, z_loss

T, E, K = 37, 6, 2


def routed(seed: int = 0) -> tuple[Tensor, Tensor, Routes]:
    """Router logits [T, E], probabilities [T, E], and the choice."""
    logits = 2 * torch.randn(T, E, generator=torch.Generator().manual_seed(seed))
    return logits, logits.softmax(-1), route(logits, topk=K)


def test_load_balancing_loss_equals_a_loop() -> None:
    _, probabilities, routes = routed()
    loss = 0.0
    for expert in range(E):
        chosen = sum(int(e) == expert for row in routes.experts_TK for e in row) / (T * K)
        wanted = sum(float(row[expert]) for row in probabilities) / T
        loss += E * chosen * wanted
    assert load_balancing_loss(routes).item() == pytest.approx(loss, rel=1e-5)


def test_z_loss_equals_a_loop() -> None:
    logits, _, routes = routed()
    expected = sum(math.log(sum(math.exp(float(logit)) for logit in row)) ** 2 for row in logits) / T
    assert z_loss(routes).item() == pytest.approx(expected, rel=1e-5)


def test_transformers_counts_each_choice_whole() -> None:
    """On one layer its loss is K times ours; on two it pools the layers first, which is no sum of losses."""
    (one, _, first), (other, _, second) = routed(0), routed(1)
    ours = [load_balancing_loss(routes).item() for routes in (first, second)]
    assert load_balancing_loss_func((one,), E, K).item() == pytest.approx(K * ours[0], rel=1e-5)
    pooled = load_balancing_loss_func((one, other), E, K).item()
    assert abs(pooled - K * sum(ours) / 2) > 1e-4


@pytest.mark.parametrize(
    ("favoured", "expected"),
    [(None, 1.0), (0, float(E))],
)
def test_load_balancing_loss_runs_from_one_to_e(favoured: int | None, expected: float) -> None:
    logits = torch.zeros(E, E) if favoured is None else 100 * torch.eye(E)[[favoured] * E]
    experts = torch.arange(E) if favoured is None else torch.full((E,), favoured)
    assert load_balancing_loss(routes_of_choice(logits, experts[:, None])).item() == pytest.approx(expected, rel=1e-6)


def test_its_gradient_pushes_away_from_the_crowded_expert() -> None:
    logits = torch.zeros(T, E, requires_grad=True)
    experts = torch.zeros(T, K, dtype=torch.long)
    experts[: E - 1, 1] = torch.arange(1, E)
    load_balancing_loss(routes_of_choice(logits, experts)).backward()
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1:] < 0).all()
