"""Which neurons of a dense MLP go together into an expert, by what they do on a text.

Shapes: T tokens, F dense width, R neurons that are not the shared expert's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ckptbridge.converters.upcycling.activity import active, most_active
from ckptbridge.converters.upcycling.clustering import balanced_clusters
from ckptbridge.converters.upcycling.drawn import generator_for
from ckptbridge.converters.upcycling.measured import LayerMeasurement
from ckptbridge.converters.upcycling.spec import UpcycleSpec

MOST_TOKENS = 2048
"""Neurons are compared on so many tokens, taken evenly from the sample."""


def carved(spec: UpcycleSpec, layer: int, sizes_TF: Tensor) -> LayerMeasurement:
    """The shared expert's neurons and each expert's, of a resolved spec that clusters.

    Shared are the neurons that are active for the most tokens. The others are clustered by where they are active
    (cmoe), or by how much of a token's output they add (split): neurons that serve the same tokens come together.
    """
    sizes_TF = evenly(sizes_TF, MOST_TOKENS)
    width = sizes_TF.shape[1]
    is_active_TF = active(sizes_TF)
    count = spec.shared_neurons(width)
    shared = most_active(is_active_TF, sizes_TF, count) if count else None
    is_routed_F = torch.ones(width, dtype=torch.bool)
    if shared is not None:
        is_routed_F[shared] = False
    routed = is_routed_F.nonzero()[:, 0]
    share_TF = sizes_TF / sizes_TF.square().sum(1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    features_TR = (is_active_TF.float() if spec.method == "cmoe" else share_TF)[:, routed]
    generator = generator_for(spec.seed, "clusters", layer)
    clusters = balanced_clusters(features_TR.T.contiguous(), spec.num_experts, generator)
    return LayerMeasurement(shared=shared, shards=tuple(routed[cluster] for cluster in clusters))


def evenly(tokens: Tensor, most: int) -> Tensor:
    """At most `most` of the first dimension's entries, at even distances."""
    if len(tokens) <= most:
        return tokens
    return tokens[torch.arange(most) * len(tokens) // most]
