"""Which experts of a mixture are kept, copied or merged, by what a text showed of them.

Shapes: T tokens, N experts of the source, n experts of the result, G groups of experts.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.upcycling.clusters import clusters_of
from ckptbridge.converters.upcycling.measured import LayerMeasurement, MixtureSample
from ckptbridge.converters.upcycling.spec import UpcycleSpec


def mixture_needs_text(spec: UpcycleSpec, config: ModelConfig) -> bool:
    """Whether a resolved spec for mixtures decides by what a text shows."""
    if spec.method == "expert-upcycling":
        return spec.num_experts % (config.num_moe_experts or 1) != 0
    return spec.method in ("prune", "merge")


def measure_mixture_layer(spec: UpcycleSpec, config: ModelConfig, sample: MixtureSample) -> LayerMeasurement:
    """What a resolved spec does with the experts of one layer; `config` is the source's.

    An expert's load is the sum of the weights that its outputs had; of equal ones the expert that met more tokens
    counts more, then the one with the smaller number. Where experts lie in groups, each group gives as many.
    Raises BadInputError for a method that looks at no mixture, or a sample of another model.
    """
    experts = config.num_moe_experts or 0
    if len(sample.rows_N) != experts or len(sample.weights_N) != experts or sample.logits_TN.shape[-1] != experts:
        raise BadInputError(
            f"layer {sample.layer}: the sample is of {len(sample.rows_N)} experts, but the model has {experts}"
        )
    if spec.method == "prune":
        return LayerMeasurement(order=_kept(spec, config, sample))
    if spec.method == "expert-upcycling":
        return LayerMeasurement(order=_copied(spec.num_experts, sample))
    if spec.method == "merge":
        groups = config.moe_router_num_groups or 1
        parts = [
            clusters_of(logits_Tg, spec.num_experts // groups) + number * (spec.num_experts // groups)
            for number, logits_Tg in enumerate(sample.logits_TN.chunk(groups, dim=-1))
        ]
        return LayerMeasurement(order=torch.cat(parts), weights=sample.weights_N.double())
    raise BadInputError(f"method {spec.method} does not look at the experts of a mixture")


def _by_load(sample: MixtureSample) -> list[int]:
    """The experts, the busiest first."""
    weights = cast(list[float], sample.weights_N.tolist())
    rows = cast(list[float], sample.rows_N.tolist())
    return sorted(range(len(weights)), key=lambda expert: (-weights[expert], -rows[expert], expert))


def _kept(spec: UpcycleSpec, config: ModelConfig, sample: MixtureSample) -> Tensor:
    """The busiest experts, of every group as many; [n], ascending."""
    groups, experts = config.moe_router_num_groups or 1, config.num_moe_experts or 0
    kept: list[int] = []
    for group in range(groups):
        own = range(group * experts // groups, (group + 1) * experts // groups)
        kept += [expert for expert in _by_load(sample) if expert in own][: spec.num_experts // groups]
    return torch.tensor(sorted(kept))


def _copied(num_experts: int, sample: MixtureSample) -> Tensor:
    """Every expert, then one copy more of whichever has the largest load a copy, until there are enough; [n]."""
    weights = cast(list[float], sample.weights_N.tolist())
    order, copies = list(range(len(weights))), [1] * len(weights)
    by_load = _by_load(sample)
    while len(order) < num_experts:
        busiest = max(by_load, key=lambda expert: weights[expert] / copies[expert])
        copies[busiest] += 1
        order.append(busiest)
    return torch.tensor(order)
