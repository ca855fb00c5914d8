"""What lies among a checkpoint's weights and is not trained: a module's buffers, of which optimizers hold no state."""

from __future__ import annotations

_BUFFERS = (".mlp.router.expert_bias",)
"""Megatron registers it as a buffer and moves it itself after a step (megatron-core 0.16 to 0.19, moe/router.py)."""


def has_optimizer_state(name: str) -> bool:
    """Whether an optimizer holds main weight and moments of a parameter, by its name with layer and expert numbers."""
    return not name.endswith(_BUFFERS)
