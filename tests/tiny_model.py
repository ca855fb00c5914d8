"""What a tiny model of a test is made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyModel:
    """A transformers class (its name without "Config") and what its config has beside the common sizes."""

    hf_class: str
    config: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    """Common sizes that this class does not know."""
    max_shard_size: str = "5GB"
    further_layers: int = 0
    """Layers behind the last one that predict further tokens: published files have them, the class ignores them."""
    not_in_megatron: str = ""
    """Why the stock GPTModel of megatron-core computes something else; empty if it computes this model."""

    @property
    def is_moe(self) -> bool:
        return "num_experts_per_tok" in self.config
