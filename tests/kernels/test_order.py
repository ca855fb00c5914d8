"""order_by_expert: both backends against a plain loop, what a loop says against megatron-core, planted faults."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from ckptbridge.kernels.order import Order, OrderConfig, expert_capacity, order_by_expert
from tests.kernels.cases_routing import REAL_ORDER, SMALL_ORDER, OrderCase
from tests.kernels.oracle_order import check_order, order_case

CASES = SMALL_ORDER + (REAL_ORDER if torch.cuda.is_available() else [])


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_order_is_that_of_a_loop(case, backend, device):
    check_order(partial(order_by_expert, backend=backend), case, device)


def test_other_launch_knobs_give_the_same_order(device):
    config = OrderConfig(block_choices=32, max_programs=3, counts_at_once=64, num_warps=2)
    for case in (OrderCase(T=301, E=60, K=4), OrderCase(T=301, E=60, K=4, factor=1.0, spread="skewed")):
        check_order(partial(order_by_expert, backend="triton", config=config), case, device)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_one_expert_chosen_twice_by_a_token(backend, device):
    experts_TK = torch.tensor([[1, 1], [0, 1], [1, 1]], dtype=torch.int32, device=device)
    order = order_by_expert(experts_TK, 3, backend=backend)
    assert order.tokens_R.tolist() == [1, 0, 0, 1, 2, 2]
    assert order.rows_TK.tolist() == [[1, 2], [0, 3], [4, 5]]
    assert order.ends_E.tolist() == [1, 6, 6]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_negative_weights_rank_below_positive_ones(backend, device):
    experts_TK = torch.zeros(6, 1, dtype=torch.int32, device=device)
    weights_TK = torch.tensor([[-1.0], [0.5], [-0.0], [-2.0], [0.25], [1e-38]], device=device)
    order = order_by_expert(experts_TK, 1, capacity=4, weights_TK=weights_TK, backend=backend)
    assert order.tokens_R[:4].tolist() == [1, 2, 4, 5]
    assert order.rows_TK.flatten().tolist() == [-1, 0, 1, -1, 2, 3]


def test_capacity_is_a_share_and_no_more_than_all_tokens():
    assert expert_capacity(16384, 2, 8, 1.0) == 4096
    assert expert_capacity(10, 2, 3, 1.1) == 8  # 7.33 and up
    assert expert_capacity(16384, 2, 8, 8.0) == 16384
    assert expert_capacity(0, 2, 8, 1.0) == 0


# Planted faults: each computes something else than the definition, and the oracle must say so.


def _unstable(experts_TK, num_experts, **keywords):
    order = order_by_expert(experts_TK.flip(0), num_experts, **keywords)
    tokens_R = torch.where(order.tokens_R < 0, -1, len(experts_TK) - 1 - order.tokens_R)
    return Order(tokens_R, order.rows_TK.flip(0), order.ends_E)


def _ends_are_starts(experts_TK, num_experts, **keywords):
    order = order_by_expert(experts_TK, num_experts, **keywords)
    return replace(order, ends_E=order.ends_E.roll(1))


def _rows_are_not_where_tokens_are(experts_TK, num_experts, **keywords):
    order = order_by_expert(experts_TK, num_experts, **keywords)
    return replace(order, rows_TK=order.rows_TK.roll(1, 0))


def _choice_for_token(experts_TK, num_experts, **keywords):
    order = order_by_expert(experts_TK, num_experts, **keywords)
    return replace(order, tokens_R=order.tokens_R * experts_TK.shape[1])


def _drops_nothing(experts_TK, num_experts, **keywords):
    return order_by_expert(experts_TK, num_experts)


def _drops_by_position(experts_TK, num_experts, **keywords):
    return order_by_expert(experts_TK, num_experts, **keywords | {"drop_policy": "position"})


def _keeps_the_lowest(experts_TK, num_experts, **keywords):
    return order_by_expert(experts_TK, num_experts, **keywords | {"weights_TK": -keywords["weights_TK"]})


def _dropped_rows_keep_their_place(experts_TK, num_experts, **keywords):
    order = order_by_expert(experts_TK, num_experts, **keywords)
    return replace(order, rows_TK=order.rows_TK.clamp(min=0))


def _forgets_the_padding(experts_TK, num_experts, **keywords):
    return order_by_expert(experts_TK, num_experts, **keywords | {"pad_to_capacity": False})


def _padding_is_token_0(experts_TK, num_experts, **keywords):
    order = order_by_expert(experts_TK, num_experts, **keywords)
    return replace(order, tokens_R=order.tokens_R.clamp(min=0))


DROPPING = OrderCase(T=60, E=8, K=2, spread="one", factor=1.0)
PADDED = replace(DROPPING, pads=True)


@pytest.mark.parametrize(
    ("fault", "caught_as", "case"),
    [
        (_unstable, "tokens_R", OrderCase(T=37, E=6, K=2)),
        (_ends_are_starts, "ends_E", OrderCase(T=37, E=6, K=2)),
        (_rows_are_not_where_tokens_are, "rows_TK", OrderCase(T=37, E=6, K=2)),
        (_choice_for_token, "tokens_R", OrderCase(T=37, E=6, K=2)),
        (_drops_nothing, "ends_E", DROPPING),
        (_drops_by_position, "tokens_R", DROPPING),
        (_keeps_the_lowest, "tokens_R", DROPPING),
        (_dropped_rows_keep_their_place, "rows_TK", DROPPING),
        (_forgets_the_padding, "ends_E", PADDED),
        (_padding_is_token_0, "tokens_R", PADDED),
    ],
)
def test_oracle_catches(fault, caught_as, case, device):
    check_order(order_by_expert, case, device)
    with pytest.raises(AssertionError, match=caught_as):
        check_order(fault, case, device)


def test_arguments_that_do_not_fit():
    experts_TK = torch.zeros(3, 2, dtype=torch.int32)
    weights_TK = torch.zeros(3, 2)

    def refused(match: str, experts_TK=experts_TK, num_experts=4, **keywords):
        with pytest.raises(ValueError, match=match):
            order_by_expert(experts_TK, num_experts, **keywords)

    refused(r"experts_TK: expected two dimensions of torch.int32 .* found \(6,\) of torch.int32", experts_TK.flatten())
    refused(r"experts_TK: .* found \(3, 2\) of torch.float32", experts_TK.float())
    refused("num_experts: expected 1 to 1024, found 0", num_experts=0)
    refused("num_experts: expected 1 to 1024, found 1025", num_experts=1025)
    refused("drop_policy: expected probs or position, found 'random'", drop_policy="random")
    refused("pad_to_capacity: expected a capacity to pad to, found None", pad_to_capacity=True)
    refused("capacity: expected at least 0, found -1", capacity=-1, weights_TK=weights_TK)
    refused("weights_TK: expected the weights that drop_policy probs compares, found None", capacity=1)
    refused(r"weights_TK: expected shape \(3, 2\)", capacity=1, weights_TK=weights_TK[:2])
    refused("weights_TK: expected dtype torch.float32", capacity=1, weights_TK=weights_TK.double())
    refused("backend: expected one of reference", backend="cuda")


def test_case_of_a_capacity_drops_and_pads(device):
    """The cases hold what they were chosen for."""
    order = order_by_expert(*order_case(PADDED, device)[0], **order_case(PADDED, device)[1])
    assert (order.rows_TK < 0).any()
    assert (order.tokens_R < 0).any()
