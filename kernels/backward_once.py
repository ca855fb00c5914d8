"""A backward pass that writes over what it needs runs once.

torch notices a kept tensor that was written into by its version, but not one that came through hooks of saved tensors:
under recompute, offload or `save_on_cpu` a second pass would silently compute with the first one's results.
"""

from __future__ import annotations

from typing import Any

_SPENT = "is_spent"


def refuse_second_backward(ctx: Any, operation: str) -> None:
    """Raise RuntimeError when the backward pass of an autograd function's context has begun before."""
    if getattr(ctx, _SPENT, False):
        raise RuntimeError(
            f"{operation}: a second backward pass through one graph, whose first wrote over what it needs; "
            "run forward again instead of retain_graph"
        )
    setattr(ctx, _SPENT, True)
