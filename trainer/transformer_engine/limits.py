"""What a recipe may not ask of Transformer Engine's modules; told before anything is loaded."""

from __future__ import annotations

from ckptbridge.converters.errors import BadInputError
from ckptbridge.trainer.recipe import Recipe


def refuse_beyond_transformer_engine(recipe: Recipe) -> None:
    """Raise BadInputError for a setting that means this package's own modules."""
    why = {
        "memory.recompute": (
            recipe.memory.recompute != "none",
            "its modules are told where a gradient is summed when they run forward, which a layer may do once a step",
        ),
        "moe.capacity_factor": (recipe.moe.capacity_factor is not None, "its experts drop and pad no tokens"),
        "kernels.attention": (recipe.kernels.attention != "auto", "it chooses attention's kernels by itself"),
    }
    for key, (is_asked, reason) in why.items():
        if is_asked:
            raise BadInputError(
                f"{key}: not with kernels.backend transformer_engine: {reason}; leave it out, or use another backend"
            )
