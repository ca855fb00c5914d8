"""Whether a way to upcycle computes what the dense model computes, before anything is built.

The criterion: for every token and every neuron, the factor of the experts that hold the neuron times the sum of their
weights is one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.upcycling.factors import output_scale
from ckptbridge.converters.upcycling.layers import chosen_layers
from ckptbridge.converters.upcycling.mixture_semantics import check_mixture
from ckptbridge.converters.upcycling.spec import DENSE_METHODS, MIXTURE_METHODS, PARTITIONS, UpcycleSpec
from ckptbridge.converters.upcycling.ties import may_saturate, router_is_zero, ties_between_shards, torn_by_ties
from ckptbridge.converters.upcycling.unused_options import refuse_unused


@dataclass(frozen=True, slots=True)
class Exactness:
    """`inexact` says why the mixture differs from its source; without a reason it computes the same function.

    `conditions` are what has to hold while it is used.
    """

    inexact: tuple[str, ...]
    conditions: tuple[str, ...]

    @property
    def is_exact(self) -> bool:
        return not self.inexact


def check(spec: UpcycleSpec, source: ModelConfig) -> Exactness:
    """Whether a resolved spec is exact for a source.

    Raises BadInputError, naming the numbers, for what cannot be built, and for what cannot work unless
    `allow_inexact` is set.
    """
    _check_numbers(spec)
    if spec.method in MIXTURE_METHODS:
        unlike, by_design, conditions = check_mixture(spec, source)
        unable: list[str] = []
    else:
        _check_sizes(spec, source)
        refuse_unused(spec)
        unlike, unable = _unlike_the_dense(spec, source), _unable_to_learn(spec)
        by_design, conditions = _by_design(spec, source), _conditions(spec)
    if (unlike or unable) and not spec.allow_inexact:
        raise BadInputError("; ".join([*unlike, *unable]) + ". To do it all the same, add --allow-inexact")
    return Exactness((*unlike, *by_design), tuple(conditions))


def _check_numbers(spec: UpcycleSpec) -> None:
    n, t, g = spec.num_experts, spec.chosen if spec.method in DENSE_METHODS else spec.topk or 1, spec.granularity
    if not 0 <= spec.seed < 2**40:
        raise BadInputError(f"seed is {spec.seed}: it must lie between 0 and 2**40")
    for name in ("router_std", "router_noise", "noise"):
        value = getattr(spec, name)
        if value is not None and not 0 <= value < math.inf:
            raise BadInputError(f"{name} is {value}: it must be a number from 0")
    for name in ("drop_ratio", "shared_weight"):
        if not 0 <= getattr(spec, name) <= 1:
            raise BadInputError(f"{name} is {getattr(spec, name)}: it must lie between 0 and 1")
    if min(n, t, g) < 1:
        raise BadInputError(f"num_experts {n}, topk {t} and granularity {g} must each be at least 1")
    if t > n:
        raise BadInputError(f"topk {t} exceeds num_experts {n}")
    if spec.method in MIXTURE_METHODS:
        return
    if spec.router_init in ("neurons", "fitted") and spec.method not in PARTITIONS:
        raise BadInputError(
            f"router_init {spec.router_init} tells experts apart by their neurons, and method {spec.method} gives "
            f"every group the same ones; it goes with {' and '.join(PARTITIONS)}"
        )
    if spec.router_groups and spec.router != "sigmoid":
        raise BadInputError("router_groups needs router sigmoid: no class with a softmax router chooses groups first")
    if spec.router_groups and (g < 2 or t % g):
        raise BadInputError(f"router_groups needs granularity {g} to be at least 2 and to divide topk {t}")


def _check_sizes(spec: UpcycleSpec, dense: ModelConfig) -> None:
    n, g, ffn = spec.num_experts, spec.granularity, dense.ffn_hidden_size
    if dense.num_moe_experts is not None:
        raise BadInputError(
            f"the source has {dense.num_moe_experts} experts already, and method {spec.method} is for dense models; "
            "for mixtures there are expert-upcycling, prune and merge"
        )
    if spec.method == "copy" and g != 1:
        raise BadInputError(f"method copy makes whole copies, but granularity is {g}; use --method virtual-group")
    if n % g:
        raise BadInputError(f"num_experts {n} is not a multiple of granularity {g}: a group would lack a shard")
    shared = spec.shared_neurons(ffn)
    if not 0 <= shared < ffn:
        raise BadInputError(f"shared_width is {shared}: it must lie below the MLP's width {ffn}")
    if (ffn - shared) % g:
        left = f", less {shared} of the shared expert," if shared else ""
        parts = f"num_experts {n}, among which" if spec.method in PARTITIONS else f"granularity {g}, by which"
        raise BadInputError(f"the MLP's width {ffn}{left} is not a multiple of {parts} method {spec.method} divides it")
    chosen_layers(spec.layers, dense.num_layers)


def _unlike_the_dense(spec: UpcycleSpec, dense: ModelConfig) -> list[str]:
    """What was meant to compute the dense model's function and does not."""
    t, g = spec.chosen, spec.granularity
    problems: list[str] = []
    if t % g and spec.method not in PARTITIONS:
        nearest = " or ".join(str(whole * g) for whole in range(max(1, t // g), t // g + 2))
        problems.append(
            f"topk {t} is not a multiple of granularity {g}: a token would meet some shards more often than others, "
            f"and the result would not compute what the dense model does. Use --topk {nearest}"
        )
    if g > 1 and spec.method not in PARTITIONS:
        for name in ("noise", "router_noise"):
            if getattr(spec, name):
                problems.append(
                    f"{name} is {getattr(spec, name)} and granularity {g}: with noise tokens meet some shards twice "
                    "and others never; noise goes with granularity 1"
                )
    return [*problems, *torn_by_ties(spec, dense.hidden_size)]


def _unable_to_learn(spec: UpcycleSpec) -> list[str]:
    is_no_whole_group = spec.granularity > 1 and spec.method not in PARTITIONS  # and so refused for that already
    if spec.chosen > 1 or spec.router == "pre-softmax" or is_no_whole_group:
        return []
    return [
        "topk is 1 and the chosen weights sum to one: the only weight is always 1, the router gets no gradient and "
        "never learns. Use --topk 2, or --router pre-softmax"
    ]


def _by_design(spec: UpcycleSpec, dense: ModelConfig) -> list[str]:
    """Why the chosen method is not exact, even where it does what it is meant to."""
    reasons: list[str] = []
    if spec.method == "drop" and spec.drop_ratio:
        reasons.append(f"Drop-Upcycling draws {spec.drop_ratio:.0%} of each expert anew")
    if spec.method in PARTITIONS and spec.chosen < spec.num_experts:
        reasons.append(f"a token meets {spec.chosen} of the {spec.num_experts} experts that the neurons are split into")
    if spec.method in PARTITIONS and spec.chosen == spec.num_experts and not router_is_zero(spec):
        reasons.append("a token meets every expert, but with weights that differ as soon as the router is not zero")
    if spec.method == "branch-train-mix":
        reasons.append("the experts come from different models, and what they share is averaged")
    meets_all = spec.chosen == spec.num_experts
    if spec.method in DENSE_METHODS and spec.router == "pre-softmax" and not (router_is_zero(spec) or meets_all):
        reasons.append(
            "softmax weights that are not divided by their sum are larger than 1/N as soon as the router is not zero; "
            "--calibrate FILE measures by how much"
        )
    if spec.method in DENSE_METHODS and spec.scaling == "paper" and _paper_differs(spec, dense):
        reasons.append("the published scaling multiplies gate_proj too, in which SwiGLU is not linear")
    if spec.permute and ties_between_shards(spec):
        reasons.append("a router of zeros ties across groups, and with permute a shard of one group is none of another")
    if spec.method in DENSE_METHODS and spec.scaling == "none" and output_scale(spec) != 1:
        reasons.append("the experts are not scaled")
    if spec.noise and (spec.granularity == 1 or spec.method in PARTITIONS):
        reasons.append(f"noise of {spec.noise} times each matrix's root mean square is added to the experts")
    return reasons


def _paper_differs(spec: UpcycleSpec, dense: ModelConfig) -> bool:
    is_homogeneous = not dense.gated_linear_unit and dense.activation_func == "squared_relu"
    return (output_scale(spec) != 1 or spec.shared == "overlap") and not is_homogeneous


def _conditions(spec: UpcycleSpec) -> list[str]:
    conditions = ["dropless: a capacity factor drops tokens"]
    if spec.granularity > 1 and spec.method not in PARTITIONS:
        conditions.append("the router's logits are computed in fp32: in bf16 0.2-0.4 % of tokens tie across groups")
        conditions.append("no router jitter or noise")
    if may_saturate(spec):
        conditions.append("no token's logits of two groups come near 17, where fp32 sigmoids are 1 and groups tie")
    if spec.method in DENSE_METHODS and router_is_zero(spec):
        if spec.router == "pre-softmax" and spec.chosen < spec.num_experts:
            conditions.append("the router stays zero")
        if ties_between_shards(spec):
            conditions.append(
                "where all experts tie, top-k takes neighbours, or every shard equally often, as torch does on a CPU "
                f"for {spec.chosen} of {spec.num_experts}"
            )
    return conditions
