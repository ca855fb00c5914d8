"""A mixture beside what it was made of, on one text, layer by layer: where and by how much they differ.

Shapes: T tokens of all sequences, H hidden_size, N experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.model import Model
from ckptbridge.trainer.comparison import relative_difference
from ckptbridge.trainer.decoder import Layer
from ckptbridge.trainer.mixture import Mixture
from ckptbridge.trainer.upcycling.logit_differences import LogitComparison, LogitDifferences
from ckptbridge.trainer.upcycling.samples import RouterWatch
from ckptbridge.trainer.upcycling.streaming import OnProgress, ResidualStream, StreamedModel, fed

_LOGIT_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProbe:
    """How one layer differs from the first source's; differences are |a - b| / |a| of a token, a mean over tokens."""

    layer: int
    hidden_difference: float
    """Of the hidden states behind the layer, each model on its own stream."""
    output_difference: float
    """Of what MLP and mixture add, both on the source's hidden states: this layer's part alone."""
    load: tuple[int, ...]
    """How many tokens each expert met; empty where the layer is dense."""

    @property
    def busiest(self) -> float | None:
        """The busiest expert's tokens over the mean of all; 1 is even, N / top-k is everything on the same few."""
        return max(self.load) * len(self.load) / sum(self.load) if self.load else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Layers against the first source, logits against each."""

    layers: tuple[LayerProbe, ...]
    logits: tuple[LogitDifferences, ...]


def probe(
    sources: Sequence[Model], mixture: Model, sequences: Sequence[Tensor], on_progress: OnProgress | None = None
) -> Probe:
    """Run sequences of token ids through the sources and the mixture side by side, in fp32.

    One layer of one model is in memory at a time. Raises BadInputError for models whose sizes differ.
    """
    for source in sources:
        _check_alike(source, mixture)
    flows = [ResidualStream(StreamedModel(source), sequences) for source in sources]
    mixed = ResidualStream(StreamedModel(mixture), sequences)
    layers: list[LayerProbe] = []
    for number in range(mixture.config.num_layers):
        seen = _Seen()
        for flow in flows:
            flow.advance(number, seen if flow is flows[0] else fed)
        beside = _Beside(seen)
        mixed.advance(number, beside)
        hidden = relative_difference(flows[0].x_TH, mixed.x_TH).mean().item()
        layers.append(
            LayerProbe(layer=number, hidden_difference=hidden, output_difference=beside.difference, load=beside.load)
        )
        if on_progress is not None:
            on_progress(number + 1, mixture.config.num_layers)
    return Probe(layers=tuple(layers), logits=tuple(_compare_logits(flows, mixed, sequences)))


def _check_alike(source: Model, mixture: Model) -> None:
    for field in ("vocab_size", "hidden_size", "num_layers"):
        one, other = getattr(source.config, field), getattr(mixture.config, field)
        if one != other:
            raise BadInputError(
                f"{mixture.path}: {field} is {other}, but {one} in {source.path}: it was not made of that model"
            )


class _Seen:
    """Keeps the stream behind the attention of a source's layer and what its MLP made of it."""

    def __init__(self) -> None:
        self.x_TH = self.out_TH = torch.empty(0)

    def __call__(self, number: int, layer: Layer, x_TH: Tensor) -> Tensor:
        self.x_TH, self.out_TH = x_TH, fed(number, layer, x_TH)
        return self.out_TH


class _Beside:
    """Feeds a layer the mixture's own stream and the source's together, so that experts are read once for both."""

    def __init__(self, source: _Seen) -> None:
        self.source = source
        self.difference = 0.0
        self.load: tuple[int, ...] = ()

    def __call__(self, number: int, layer: Layer, x_TH: Tensor) -> Tensor:
        watch = RouterWatch(layer.mlp.router) if isinstance(layer.mlp, Mixture) else None
        out_TH, beside_TH = fed(number, layer, torch.cat([x_TH, self.source.x_TH])).split(len(x_TH))
        self.difference = relative_difference(self.source.out_TH, beside_TH).mean().item()
        if watch is not None:
            watch.stop()
            self.load = tuple(map(int, watch.rows(len(x_TH)).tolist()))
        return out_TH


def _compare_logits(
    flows: Sequence[ResidualStream], mixed: ResidualStream, sequences: Sequence[Tensor]
) -> list[LogitDifferences]:
    last = torch.tensor([-1])
    targets_T = torch.cat([torch.cat([ids_S[1:], last]) for ids_S in sequences])
    comparisons = [LogitComparison(targets_T) for _ in flows]
    blocks: list[Any] = [flow.model.logit_blocks(flow.normed(), _LOGIT_BLOCK_BYTES) for flow in (*flows, mixed)]
    for *of_sources, (first, mixture_TW) in zip(*blocks, strict=True):
        for comparison, (_, source_TW) in zip(comparisons, of_sources, strict=True):
            comparison.add(first, source_TW, mixture_TW)
    return [comparison.result() for comparison in comparisons]
