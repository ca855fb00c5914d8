"""Routers whose top-k has to choose among experts that are alike, and what it takes then.

Top-k without an order among equal values takes some of them: torch on a CPU takes neighbours for 4 of 16 or 8 of 64,
but numbers 13 to 18, 21 and 23 for 8 of 24. Virtual groups hold together only where every shard is taken as often as
every other one.
Shapes: N experts, T top-k, G granularity, H hidden_size.
"""

from __future__ import annotations

from functools import cache

import torch

from ckptbridge.converters.upcycling.spec import PARTITIONS, UpcycleSpec

LEAST_SPREAD = 1e-3
"""Standard deviation of the logits, std * sqrt(H), below which groups tie by rounding: in fp32 about 1 token in 10,000
at 1e-3, 1 in 100 at 1e-5."""


def router_is_zero(spec: UpcycleSpec) -> bool:
    """Whether every token finds all experts alike: rows of any kind are scaled to `router_std`."""
    return spec.router_std == 0 and not spec.router_noise


def ties_between_shards(spec: UpcycleSpec) -> bool:
    """Whether a router of zeros leaves it to top-k which shards of which groups a token meets."""
    return _can_be_torn(spec) and router_is_zero(spec)


def torn_by_ties(spec: UpcycleSpec, hidden_size: int) -> list[str]:
    """Why a router of zeros, or one that is nearly zero, tears the groups of a resolved spec apart, if it does."""
    if not _can_be_torn(spec) or spec.router_std is None or spec.router_noise:
        return []
    n, t, g = spec.num_experts, spec.chosen, spec.granularity
    instead = f"Use a wider router, --router sigmoid --router-groups, which chooses whole groups, or --topk {n}"
    if spec.router_std == 0:
        taken = taken_of_equals(n, t)
        met = [sum(number % g == shard for number in taken) for shard in range(g)]
        if len({*met}) == 1:
            return []
        return [
            f"router_std is 0 and granularity {g}: all {n} experts tie, and the {t} that top-k takes then "
            f"({', '.join(map(str, taken))}) hold some shards more often than others. {instead}"
        ]
    spread = spec.router_std * hidden_size**0.5
    if spread >= LEAST_SPREAD:
        return []
    return [
        f"router_std is {spec.router_std:g} and granularity {g}: logits that spread by {spread:.1g} tie between groups "
        f"by rounding, and tokens meet some shards twice and others never. {instead}"
    ]


def may_saturate(spec: UpcycleSpec) -> bool:
    """Whether groups of a resolved spec tie where several sigmoids are exactly 1: in fp32 beyond logits of 17."""
    return spec.router == "sigmoid" and _can_be_torn(spec) and not router_is_zero(spec)


@cache
def taken_of_equals(num_experts: int, topk: int) -> tuple[int, ...]:
    """The numbers of the experts that torch takes on a CPU when all are alike, in order."""
    taken = torch.ones(num_experts).topk(topk).indices.sort().values
    return tuple(int(number) for number in taken)


def _can_be_torn(spec: UpcycleSpec) -> bool:
    is_grouped = spec.granularity > 1 and spec.method not in PARTITIONS and not spec.router_groups
    return is_grouped and spec.chosen % spec.granularity == 0 and spec.chosen < spec.num_experts
