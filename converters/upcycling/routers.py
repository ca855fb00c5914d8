"""The router of an upcycled layer.

One row a group, repeated for its shards, so that a token whose top-k is a multiple of G always meets whole groups.
Shapes: E groups, G granularity, N = E*G experts, H hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.tensors import Computed, LazyTensor
from ckptbridge.converters.upcycling.drawn import generator_for
from ckptbridge.converters.upcycling.measured import LayerMeasurement
from ckptbridge.converters.upcycling.spec import PARTITIONS, UpcycleSpec

_SOFTMAX_SPREAD, _SIGMOID_SPREAD = 8.0, 2.0


def router_rows(
    spec: UpcycleSpec, config: ModelConfig, layer: int, dtype: torch.dtype, measured: LayerMeasurement | None
) -> LazyTensor:
    """The router's weight [N, H] of one layer of a resolved spec.

    Raises BadInputError when the rows come from a measurement and there is none.
    """
    given = measured.router_rows if measured is not None else None
    if spec.router_init != "random" and given is None:
        raise BadInputError(f"router_init is {spec.router_init}: it needs a text (--calibrate FILE or --prompts FILE)")

    def made() -> Tensor:
        rows = drawn_rows(spec, config, layer) if given is None else given.float()
        rows_NH = rows if len(rows) == spec.num_experts else rows.repeat_interleave(spec.granularity, 0)
        if spec.router_noise:
            noise = torch.randn(rows_NH.shape, generator=generator_for(spec.seed, "router noise", layer))
            rows_NH = rows_NH + noise * spec.router_noise
        return rows_NH.to(dtype)

    return Computed((spec.num_experts, config.hidden_size), dtype, _rows_of(made))


def drawn_std(spec: UpcycleSpec, config: ModelConfig) -> float:
    """The standard deviation of drawn rows, where the spec does not name one.

    It is the model's own initialisation unless shards of one copy have to be chosen together. Training moves rows of
    a group apart, by about the learning rate a step, and a token that lies near the border between two groups then
    meets some shards of each. Logits of standard deviation 8 (of sigmoids 2, which would tie at 1 beyond that) leave
    few tokens there: benchmarks/upcycling_training.py. Rows that are chosen by whole groups need nothing of the kind.
    """
    if spec.router_std is not None:
        return spec.router_std
    is_torn = spec.granularity > 1 and spec.method not in PARTITIONS and not spec.router_groups
    if not is_torn or spec.router == "pre-softmax":
        return config.init_method_std
    return (_SIGMOID_SPREAD if spec.router == "sigmoid" else _SOFTMAX_SPREAD) / config.hidden_size**0.5


def drawn_rows(spec: UpcycleSpec, config: ModelConfig, layer: int) -> Tensor:
    """One row a group (of a partition: an expert), [E or N, H] in fp32, drawn by (seed, layer)."""
    rows = spec.num_experts if spec.method in PARTITIONS else spec.groups
    generator = torch.Generator().manual_seed(spec.seed * 1_000_003 + layer)
    return torch.randn(rows, config.hidden_size, generator=generator) * drawn_std(spec, config)


def _rows_of(make: Callable[[], Tensor]) -> Callable[[int, int], Tensor]:
    return lambda start, stop: make()[start:stop]
