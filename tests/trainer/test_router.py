"""The load-balancing loss against a naive loop, its relation to transformers' function, and the way of tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from ckptbridge.trainer.dispatch import Order, combine, dispatch
from ckptbridge.trainer.grouped_linear import grouped_linear
from ckptbridge.trainer.router import load_balancing_loss

T, E, K, H = 37, 6, 2, 5


def routed(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Router logits [T, E], probabilities [T, E] and choices [T, K]."""
    logits = 2 * torch.randn(T, E, generator=torch.Generator().manual_seed(seed))
    probabilities = logits.softmax(-1)
    return logits, probabilities, probabilities.topk(K, dim=-1).indices


def test_load_balancing_loss_equals_a_loop() -> None:
    _, probabilities, experts = routed()
    loss = 0.0
    for expert in range(E):
        chosen = sum(int(e) == expert for row in experts for e in row) / (T * K)
        wanted = sum(float(row[expert]) for row in probabilities) / T
        loss += E * chosen * wanted
    rows = torch.bincount(experts.flatten(), minlength=E)
    assert load_balancing_loss(probabilities, rows).item() == pytest.approx(loss, rel=1e-5)


def test_transformers_counts_each_choice_whole() -> None:
    """On one layer its loss is K times ours; on two it pools the layers first, which is no sum of losses."""
    (one, p, e), (other, q, f) = routed(0), routed(1)
    ours = [
        load_balancing_loss(probabilities, torch.bincount(experts.flatten(), minlength=E)).item()
        for probabilities, experts in ((p, e), (q, f))
    ]
    assert load_balancing_loss_func((one,), E, K).item() == pytest.approx(K * ours[0], rel=1e-5)
    pooled = load_balancing_loss_func((one, other), E, K).item()
    assert abs(pooled - K * sum(ours) / 2) > 1e-4


@pytest.mark.parametrize(
    ("favoured", "expected"),
    [(None, 1.0), (0, float(E))],
)
def test_load_balancing_loss_runs_from_one_to_e(favoured: int | None, expected: float) -> None:
    probabilities = torch.full((E, E), 1 / E) if favoured is None else torch.eye(E)[[favoured] * E]
    rows = torch.full((E,), 1) if favoured is None else E * torch.eye(E, dtype=torch.long)[favoured]
    assert load_balancing_loss(probabilities, rows).item() == pytest.approx(expected, rel=1e-6)


def test_its_gradient_pushes_away_from_the_crowded_expert() -> None:
    logits = torch.zeros(T, E, requires_grad=True)
    rows = torch.tensor([T * K - E + 1, *[1] * (E - 1)])
    load_balancing_loss(logits.softmax(-1), rows).backward()
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1:] < 0).all()


def test_dispatch_and_combine_equal_a_loop_forward_and_backward() -> None:
    generator = torch.Generator().manual_seed(3)
    x, grad = (torch.randn(T, H, generator=generator, dtype=torch.float64) for _ in range(2))
    matrices = torch.randn(E, 4, H, generator=generator, dtype=torch.float64)
    back = torch.randn(E, H, 4, generator=generator, dtype=torch.float64)
    _, probabilities, experts = routed()
    experts = experts.masked_fill(experts == 4, 5)  # expert 4 meets no token; some meet expert 5 twice
    weights = probabilities.double().gather(1, experts)

    def fast(x: Tensor, weights: Tensor, matrices: Tensor, back: Tensor) -> Tensor:
        order = Order.of(experts, E)
        rows = order.rows_E
        assert rows[4] == 0
        return combine(grouped_linear(grouped_linear(dispatch(x, order), matrices, rows), back, rows), weights, order)

    def slow(x: Tensor, weights: Tensor, matrices: Tensor, back: Tensor) -> Tensor:
        return torch.stack(
            [
                sum(weights[t, k] * back[experts[t, k]] @ (matrices[experts[t, k]] @ x[t]) for k in range(K))
                for t in range(T)
            ]
        )

    results = []
    for compute in (fast, slow):
        inputs = [tensor.clone().requires_grad_() for tensor in (x, weights, matrices, back)]
        out = compute(*inputs)
        out.backward(grad)
        results.append([out, *(tensor.grad for tensor in inputs)])
    for ours, loop in zip(*results, strict=True):
        torch.testing.assert_close(ours, loop, rtol=1e-12, atol=1e-12)
