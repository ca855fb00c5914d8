"""The oracle of order_by_expert: a plain loop over choices, compared exactly."""

# Shapes: T tokens, E experts, K top-k, R sorted rows.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ckptbridge.kernels.order import Order, expert_capacity
from tests.kernels.cases_routing import OrderCase, random_choices
from tests.kernels.poison import poisoned_memory


def order_case(case: OrderCase, device: torch.device, seed: int = 0) -> tuple[tuple[Tensor, int], dict[str, Any]]:
    """Arguments and keywords of one call."""
    experts_TK, weights_TK = random_choices(case, device, seed)
    keywords: dict[str, Any] = {}
    if case.factor is not None:
        capacity = expert_capacity(case.T, case.K, case.E, case.factor)
        keywords = {"capacity": capacity, "drop_policy": case.drop_policy, "pad_to_capacity": case.pads}
        keywords["weights_TK"] = weights_TK
    return (experts_TK, case.E), keywords


@poisoned_memory()
def check_order(operation: Callable[..., Order], case: OrderCase, device: torch.device, seed: int = 0) -> None:
    """Run `operation` on a case; AssertionError names the first result that is off."""
    arguments, keywords = order_case(case, device, seed)
    actual = operation(*arguments, **keywords)
    expected = order_of_a_loop(arguments[0].cpu(), case, keywords)
    end = int(expected.ends_E[-1])
    buffer = case.E * keywords["capacity"] if case.pads else case.T * case.K
    assert actual.tokens_R.shape == (buffer,), f"tokens_R: shape {tuple(actual.tokens_R.shape)}, not {(buffer,)}"
    for name, ours, theirs in (
        ("ends_E", actual.ends_E, expected.ends_E),
        ("tokens_R", actual.tokens_R[:end], expected.tokens_R),
        ("rows_TK", actual.rows_TK, expected.rows_TK),
    ):
        assert ours.dtype == torch.int32, f"{name}: {ours.dtype}, not torch.int32"
        assert ours.is_contiguous(), f"{name}: not contiguous"
        assert ours.shape == theirs.shape, f"{name}: shape {tuple(ours.shape)}, not {tuple(theirs.shape)}"
        differs = (ours.cpu() != theirs).nonzero()
        assert not len(differs), f"{name}: {len(differs)} elements are off, first at {tuple(differs[0].tolist())}"


def order_of_a_loop(experts_TK: Tensor, case: OrderCase, keywords: dict[str, Any]) -> Order:
    """The order, without the garbage behind its last row."""
    capacity = keywords.get("capacity")
    chosen: list[list[tuple[int, int]]] = [[] for _ in range(case.E)]
    for token, experts in enumerate(experts_TK.tolist()):
        for choice, expert in enumerate(experts):
            chosen[expert].append((token, choice))
    rows_TK = torch.full(experts_TK.shape, -1, dtype=torch.int32)
    tokens: list[int] = []
    ends: list[int] = []
    weights = keywords["weights_TK"].tolist() if "weights_TK" in keywords else None
    for kept in chosen:
        if capacity is not None and weights is not None:
            if case.drop_policy == "probs":
                kept = sorted(kept, key=lambda at: -weights[at[0]][at[1]])  # stable: of equal ones the earlier token's
            kept = sorted(kept[:capacity])
        for token, choice in kept:
            rows_TK[token, choice] = len(tokens)
            tokens.append(token)
        if case.pads:
            tokens += [-1] * (capacity - len(kept))
        ends.append(len(tokens))
    return Order(torch.tensor(tokens, dtype=torch.int32), rows_TK, torch.tensor(ends, dtype=torch.int32))
