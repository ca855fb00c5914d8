"""Which neurons of a dense MLP each expert holds.

Shapes: F dense width, E groups, G granularity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.upcycling.drawn import generator_for
from ckptbridge.converters.upcycling.measured import LayerMeasurement
from ckptbridge.converters.upcycling.neurons import Neurons
from ckptbridge.converters.upcycling.spec import UpcycleSpec


@dataclass(frozen=True, slots=True)
class Partition:
    """The neurons of the shared expert, and of each shard of each group: groups[E][G]."""

    shared: Neurons | None
    groups: Sequence[Sequence[Neurons]]


def partition(spec: UpcycleSpec, layer: int, ffn_hidden_size: int, measured: LayerMeasurement | None) -> Partition:
    """How a resolved spec cuts the MLP of one layer.

    The first neurons are the shared expert's, the others go to the shards in order, in the same way for every group;
    with `permute` in an order of each group's own; of methods that measure, as the measurement says.
    Raises BadInputError when the method needs a measurement and there is none.
    """
    if spec.clusters_neurons:
        if measured is None or measured.shards is None:
            raise BadInputError(f"method {spec.method} decides by activations: give a text with --calibrate FILE")
        return Partition(range(ffn_hidden_size) if spec.shared == "overlap" else measured.shared, [measured.shards])
    first = spec.shared_neurons(ffn_hidden_size)
    width = spec.expert_width(ffn_hidden_size)
    shared: Neurons | None = range(first) if first else None
    if spec.shared == "overlap":
        shared = range(ffn_hidden_size)
    is_mixed = spec.permute or (spec.method == "split" and spec.split == "random")
    if not is_mixed:
        shards = [range(at, at + width) for at in range(first, ffn_hidden_size, width)]
        return Partition(shared, [shards] * spec.groups)
    groups: list[Sequence[Neurons]] = []
    for group in range(spec.groups):
        order = first + torch.randperm(
            ffn_hidden_size - first, generator=generator_for(spec.seed, "order", layer, group)
        )
        groups.append([order[at : at + width].sort().values for at in range(0, len(order), width)])
    return Partition(shared, groups)
