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
from ckptbridge.converters.upcycling.spec import UpcycleSpec


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


def drawn_rows(spec: UpcycleSpec, config: ModelConfig, layer: int) -> Tensor:
    """One row a group (of a partition: an expert), [E or N, H] in fp32, drawn by (seed, layer)."""
    rows = spec.num_experts if spec.groups == 1 else spec.groups
    std = config.init_method_std if spec.router_std is None else spec.router_std
    generator = torch.Generator().manual_seed(spec.seed * 1_000_003 + layer)
    return torch.randn(rows, config.hidden_size, generator=generator) * std


def _rows_of(make: Callable[[], Tensor]) -> Callable[[int, int], Tensor]:
    return lambda start, stop: make()[start:stop]
