"""How rotary frequencies are changed for contexts longer than those of the first training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3RopeScaling:
    """Llama 3.1's frequency scaling: low frequencies are divided by `factor`, high ones kept."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearRopeScaling:
    """Every frequency is divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnRopeScaling:
    """YaRN (arXiv:2309.00071): a ramp between kept and divided frequencies, and a factor for cosines and sines.

    `attention_factor` is that factor where a config names it. Otherwise it is the quotient of 0.1 m ln(factor) + 1
    for m = `mscale` and for m = `mscale_all_dim` where both are given (DeepSeek), and the same for m = 1 where not.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True
    """Whether the ramp begins and ends at whole channels (GPT-OSS: it does not)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LongRopeScaling:
    """LongRoPE (Phi-3): each frequency is divided by a factor of its own, one set for short texts and one for long."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float | None = None


RopeScaling = Llama3RopeScaling | LinearRopeScaling | YarnRopeScaling | LongRopeScaling
KINDS: dict[str, type[RopeScaling]] = {
    "llama3": Llama3RopeScaling,
    "linear": LinearRopeScaling,
    "yarn": YarnRopeScaling,
    "longrope": LongRopeScaling,
}
"""By Hugging Face's `rope_type`."""


def kind_of(scaling: RopeScaling) -> str:
    """Hugging Face's `rope_type` of a scaling."""
    return next(name for name, kind in KINDS.items() if isinstance(scaling, kind))
