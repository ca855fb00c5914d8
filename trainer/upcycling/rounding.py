"""Weights that are written in another dtype than the source's, and what that costs the comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ckptbridge.converters.convert import cast_all
from ckptbridge.converters.model import Model
from ckptbridge.converters.tensors import LazyTensor

_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def as_written(model: Model, dtype: torch.dtype | None) -> Model:
    """The model whose tensors are those that a conversion to `dtype` writes; None keeps each one's own.

    Tensors that are one object stay one, so that whoever runs the model reads copies of an expert once.
    """
    if dtype is None:
        return model
    known: dict[tuple[int, torch.dtype], LazyTensor] = {}
    made: dict[str, LazyTensor] = {}
    for name, tensor in cast_all(model.tensors, dtype).items():
        made[name] = known.setdefault((id(model.tensors[name]), tensor.dtype), tensor)
    return replace(model, tensors=made, dtype=dtype)


def narrowed_to(sources: Sequence[Model], mixture: Model) -> str | None:
    """The mixture's dtype, as bf16, if it does not hold every number that its sources have in its place; else None."""
    pairs = {(source.dtype, mixture.dtype) for source in sources}
    pairs |= {
        (source.tensors[name].dtype, tensor.dtype)
        for source in sources
        for name, tensor in mixture.tensors.items()
        if name in source.tensors
    }
    if all(torch.promote_types(old, made) == made for old, made in pairs):
        return None
    return _SHORT.get(mixture.dtype, str(mixture.dtype).removeprefix("torch."))
