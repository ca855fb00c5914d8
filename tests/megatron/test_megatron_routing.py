"""Routing, dropping and the router's losses beside the real megatron-core's functions for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ckptbridge.kernels.order import expert_capacity, order_by_expert
from ckptbridge.kernels.routing import route
from ckptbridge.trainer.router import load_balancing_loss, z_loss
from tests.megatron.launch import MEGATRON, check_fetched

pytestmark = pytest.mark.mcore

T, E, K = 67, 12, 3
RULES: dict[str, dict[str, Any]] = {
    "softmax": {"score_function": "softmax"},
    "pre_softmax": {"score_function": "softmax", "use_pre_softmax": True},
    "sigmoid": {"score_function": "sigmoid", "scaling_factor": 2.5},
    "bias": {"score_function": "sigmoid", "expert_bias": torch.linspace(-0.2, 0.2, E)},
}
DROPPINGS: dict[str, dict[str, Any] | None] = {
    "dropless": None,
    **{
        f"{policy} {factor} {'padded' if pads else 'ragged'}": {
            "capacity_factor": factor,
            "drop_policy": policy,
            "pad_to_capacity": pads,
        }
        for policy in ("probs", "position")
        for factor in (0.5, 1.1, 2.0, 5.0)
        for pads in (False, True)
    },
}
CASES = [(rule, dropping) for rule in RULES for dropping in DROPPINGS]


@pytest.fixture(scope="module")
def given() -> dict[tuple[str, str], dict[str, Any]]:
    """Logits of which one expert likes most, and gradients of the weights."""
    generator = torch.Generator().manual_seed(0)
    cases = {}
    for rule, dropping in CASES:
        logits = 2 * torch.randn(T, E, generator=generator)
        logits[: T // 2, 1] += 4
        cases[rule, dropping] = {
            "logits": logits,
            "topk": K,
            "rule": RULES[rule],
            "dropping": DROPPINGS[dropping],
            "d_probs": torch.randn(T, E, generator=generator),
        }
    return cases


@pytest.fixture(scope="module")
def megatron(given, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Tensor]]:
    """What megatron-core makes of them."""
    check_fetched()
    folder = tmp_path_factory.mktemp("routing")
    torch.save(list(given.values()), folder / "cases.pt")
    worker = Path(__file__).parent / "routing_worker.py"
    command = [sys.executable, "-W", "ignore", str(worker), str(folder / "cases.pt"), str(folder / "results.pt")]
    environment = os.environ | {"PYTHONPATH": str(MEGATRON)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(given, torch.load(folder / "results.pt"), strict=True))


@pytest.mark.parametrize(("rule", "dropping"), CASES)
def test_routing_is_megatrons(rule: str, dropping: str, given: Any, megatron: Any) -> None:
    case, theirs = given[rule, dropping], megatron[rule, dropping]
    names = {"use_pre_softmax": "pre_softmax"}
    options = {names.get(name, name): value for name, value in case["rule"].items() if name != "expert_bias"}
    logits = case["logits"].detach().clone().requires_grad_()
    routes = route(logits, case["rule"].get("expert_bias"), topk=K, **options)
    limits: dict[str, Any] = dict(case["dropping"] or {})
    capacity = expert_capacity(T, K, E, limits.pop("capacity_factor")) if limits else None
    order = order_by_expert(routes.experts_TK, E, capacity=capacity, weights_TK=routes.weights_TK, **limits)

    weights = torch.where(order.rows_TK >= 0, routes.weights_TK, 0)
    probs = torch.zeros(T, E).scatter(1, routes.experts_TK.long(), weights)
    if limits.get("drop_policy") == "position":
        # Of equal ones torch.topk takes any: which tokens megatron-core keeps is not defined, only how many.
        kept = torch.minimum(routes.choices_E, torch.tensor(capacity))
        assert torch.equal((theirs["probs"] > 0).sum(0), kept)
        assert torch.equal((probs > 0).sum(0), kept)
    else:
        torch.testing.assert_close(probs, theirs["probs"])
    if limits.get("pad_to_capacity"):
        # It pads with tokens at weight zero, and to all tokens where the capacity is more than they are.
        assert torch.equal(theirs["routing_map"].sum(0), order.ends_E.diff(prepend=torch.zeros(1)).long())

    torch.testing.assert_close(z_loss(routes), theirs["z_loss"])
    if rule == "bias":
        # Its balance is that of the experts that would have been chosen without the bias; ours, of those that were.
        assert not torch.allclose(load_balancing_loss(routes), theirs["aux_loss"])
        return
    torch.testing.assert_close(load_balancing_loss(routes), theirs["aux_loss"])
    if limits.get("drop_policy") != "position":
        total = (probs * case["d_probs"]).sum() + load_balancing_loss(routes) + z_loss(routes)
        (d_logits,) = torch.autograd.grad(total, logits)
        torch.testing.assert_close(d_logits, theirs["d_logits"])


def test_some_of_the_cases_drop(megatron: Any) -> None:
    assert (megatron["softmax", "probs 1.1 ragged"]["routing_map"].sum() < T * K).item()
    assert (megatron["softmax", "probs 5.0 ragged"]["routing_map"].sum() == T * K).item()
