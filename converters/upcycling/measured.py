"""What a text shows of each layer, for the methods that look at activations.

The converters do not run models: whoever does hands in, layer by layer, what an MLP saw and did.
Shapes: T tokens, H hidden_size, F dense width (or the width of a mixture's expert), E groups of experts, N experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpSample:
    """What the MLP of one layer of a dense model did on a text; everything fp32 on the CPU."""

    layer: int
    input_TH: Tensor
    """The normed hidden states: what a router in the MLP's place sees."""
    hidden_TF: Tensor
    """What down_proj multiplies: the neurons' outputs."""
    output_TH: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureSample:
    """What the mixture of one layer did on a text."""

    layer: int
    input_TH: Tensor
    rows_N: Tensor
    """How many tokens each expert met."""
    weights_N: Tensor
    """The sum of the weights that each expert's output was multiplied by."""
    logits_TN: Tensor
    """What the router gave each token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMeasurement:
    """What was measured in one layer; a method reads the fields that it needs."""

    shared: Tensor | None = None
    """Numbers of the neurons that every token needs."""
    shards: tuple[Tensor, ...] | None = None
    """Numbers of each expert's neurons, one width."""
    router_rows: Tensor | None = None
    """[E, H] or [N, H]."""
    scale: float = 1.0
    """What the experts' outputs are multiplied by beside what the formula says."""
    order: Tensor | None = None
    """Of a mixture: numbers of the experts to keep or to copy, or for each expert the group that it joins."""
    weights: Tensor | None = None
    """Of a mixture: how much each old expert counts within its group."""


Measured = Mapping[int, LayerMeasurement]
"""By layer, counted from 0."""
