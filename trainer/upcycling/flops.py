"""What a token costs in a forward pass of a model that is only described, as the report tells it."""

from __future__ import annotations

from ckptbridge.converters.model import Model
from ckptbridge.trainer import flops


def flops_a_token(model: Model, context: float) -> float:
    """Floating-point operations of a forward pass for a token that sees `context` tokens, itself among them."""
    return flops.flops_a_token({name: t.shape for name, t in model.tensors.items()}, model.config, context)
