"""Whether a way to make a mixture from a mixture computes what its source does, before anything is built.

Copies of an expert with equal rows get equal scores. If a token meets all m copies of what it met before, weights
that are divided by their sum, or by that over all experts, fall to a m-th each: the sum is the old one.
Shapes: N experts of the source, T its top-k, n experts of the result, m = n / N.
"""

from __future__ import annotations

from dataclasses import fields

from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.upcycling.spec import UpcycleSpec

_USED = {"num_experts", "topk", "granularity", "method", "to", "seed", "allow_inexact"}
_USED_BY_COPIES = _USED | {"router_groups", "router_noise"}


def default_topk(spec: UpcycleSpec, source: ModelConfig) -> int:
    """Top-k of the result: what is asked for, or as many as keep the function or come nearest to it."""
    n, experts, t = spec.num_experts, source.num_moe_experts or 1, source.moe_router_topk
    if spec.topk is not None:
        return spec.topk
    return t * n // experts if spec.method == "expert-upcycling" and not spec.router_groups else min(t, n)


def check_mixture(spec: UpcycleSpec, source: ModelConfig) -> tuple[list[str], list[str], list[str]]:
    """What cannot work as meant, why the result differs by design, and the conditions under which it does not.

    Raises BadInputError, naming the numbers, for what cannot be built; NotSupportedError for layers without a method.
    """
    experts = source.num_moe_experts
    if experts is None:
        raise BadInputError(
            f"the source is a dense model, and method {spec.method} is for mixtures; for dense models there are copy, "
            "virtual-group, drop, split, cmoe and branch-train-mix"
        )
    _check_options(spec)
    topk = default_topk(spec, source)
    if not 1 <= topk <= spec.num_experts:
        raise BadInputError(f"topk is {topk}: it must lie between 1 and num_experts {spec.num_experts}")
    if spec.method == "expert-upcycling":
        return _copies(spec, source, experts, topk)
    return [], _fewer(spec, source, experts, topk), ["dropless: a capacity factor drops tokens"]


def _check_options(spec: UpcycleSpec) -> None:
    used = _USED_BY_COPIES if spec.method == "expert-upcycling" else _USED
    plain = UpcycleSpec(num_experts=spec.num_experts, method=spec.method).resolved()
    for field in fields(UpcycleSpec):
        value = getattr(spec, field.name)
        if (field.name not in used or field.name == "granularity") and value != getattr(plain, field.name):
            raise BadInputError(f"{field.name} is {value!r}, which method {spec.method} does not use")


def _copies(spec: UpcycleSpec, source: ModelConfig, experts: int, topk: int) -> tuple[list[str], list[str], list[str]]:
    n, t = spec.num_experts, source.moe_router_topk
    if n <= experts:
        raise BadInputError(
            f"num_experts is {n}, but the source has {experts} experts already: expert-upcycling makes more of them, "
            "prune and merge fewer"
        )
    copies = n // experts
    if spec.router_groups:
        _check_one_copy(spec, source, experts)
    unlike: list[str] = []
    if n % experts:
        if source.moe_router_num_groups is not None or source.mtp_num_layers:
            raise BadInputError(
                f"num_experts is {n}, no multiple of the source's {experts}: its groups of experts and its layers that "
                f"predict further tokens take whole copies only. Use --num-experts {(copies + 1) * experts}"
            )
        fewer = f"{copies * experts} or " if copies > 1 else ""
        unlike.append(
            f"num_experts {n} is not a multiple of the source's {experts}: experts with more copies would weigh more. "
            f"Use --num-experts {fewer}{(copies + 1) * experts}"
        )
    elif spec.router_groups and topk != t:
        unlike.append(f"topk is {topk}, but one copy of the source's experts is met {t} at a time: use --topk {t}")
    elif not spec.router_groups and topk != copies * t:
        can_group = source.moe_router_score_function == "sigmoid" and source.moe_router_num_groups is None
        unlike.append(
            f"topk is {topk}: a token would not meet all {copies} copies of the {t} experts that it met before. "
            f"Use --topk {copies * t}" + (f", or --router-groups, which keeps topk {t}" if can_group else "")
        )
    if source.moe_router_sparse_mixer:
        unlike.append("the source's router weighs two experts one by one: the second would be a copy of the first")
    reasons: list[str] = []
    if spec.router_noise:
        reasons.append(
            f"noise of {spec.router_noise} is added to the router, so that copies part: their weights differ, and near "
            "the border of the top-k a token does not meet all of them"
        )
    conditions = ["dropless: a capacity factor drops tokens", "no router jitter or noise"]
    if not spec.router_groups:
        conditions.append(
            "the router's logits are computed in fp32: in bf16 more tokens find two experts equally good, and meet "
            "some copies of each"
        )
    if spec.router_groups:
        conditions.append(
            "all copies are equally good until training parts them (router noise, or expert biases that balance the "
            "load): until then a token may meet the first copy only"
        )
    return unlike, reasons, conditions


def _check_one_copy(spec: UpcycleSpec, source: ModelConfig, experts: int) -> None:
    """Whether each copy of all experts can be a group of which exactly one is chosen."""
    if source.moe_router_score_function != "sigmoid":
        raise BadInputError("router_groups needs a sigmoid router: no class with a softmax router chooses groups first")
    if source.moe_router_num_groups is not None:
        raise BadInputError(
            f"router_groups: the source has {source.moe_router_num_groups} groups of experts, whose copies would be "
            "chosen instead of others; leave it out, and top-k grows with the experts"
        )
    if spec.num_experts % experts or experts < 2:
        raise BadInputError(
            f"router_groups needs whole copies: num_experts {spec.num_experts} is not a multiple of the source's "
            f"{experts}, or that is less than 2"
        )


def _fewer(spec: UpcycleSpec, source: ModelConfig, experts: int, topk: int) -> list[str]:
    n, groups = spec.num_experts, source.moe_router_num_groups
    if n >= experts:
        raise BadInputError(
            f"num_experts is {n}, but the source has {experts} experts: {spec.method} leaves fewer of them"
        )
    if source.mtp_num_layers:
        raise NotSupportedError(
            f"method {spec.method}: the source has layers that predict further tokens (mtp_num_layers "
            f"{source.mtp_num_layers}), whose experts no text shows at work; leave these layers out of the source"
        )
    if groups is not None:
        least = 1 if source.moe_router_group_max else 2
        chosen = source.moe_router_group_topk or groups
        if n % groups or n // groups < least or topk > chosen * (n // groups):
            raise BadInputError(
                f"num_experts is {n}: the source has {groups} groups of experts, of which a token meets {chosen}; each "
                f"must keep as many as the others, at least {least}, and all that are met at least topk {topk}"
            )
    if spec.method == "merge":
        return [f"{n} experts are the means of {experts}"]
    reason = f"{experts - n} of {experts} experts are left out of each layer: tokens that met them meet others"
    grows = source.moe_router_pre_softmax and source.moe_router_score_function == "softmax"
    if grows:
        reason += ", and all weights grow, for they are shares of the softmax over all experts"
    if groups is not None:
        reason += (
            "; where a group loses an expert that it was ranked by, tokens that met none of them may meet others too"
        )
    elif source.moe_router_sparse_mixer:
        reason += "; weights of tokens that met none of them may change too: they are shares among all near experts"
    elif topk == source.moe_router_topk and not grows:
        reason += "; a text whose tokens met none of them is computed as before"
    return [reason]
