"""How rotary frequencies are changed for contexts longer than those of the first training."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, cast

from ckptbridge.converters.errors import BadInputError, told
from ckptbridge.converters.field_kinds import check_kinds

_OF_ANY_SIGN = ("mscale", "mscale_all_dim")


def _check(scaling: Any) -> None:
    """Raise BadInputError naming a number that no scaling can have: all but `_OF_ANY_SIGN` divide or are multiplied."""
    check_kinds(scaling, "rope_scaling.")
    for field in fields(scaling):
        value = getattr(scaling, field.name)
        numbers = cast(tuple[Any, ...], value) if isinstance(value, tuple) else (value,)
        if field.name not in _OF_ANY_SIGN and any(type(n) in (int, float) and n <= 0 for n in numbers):
            raise BadInputError(f"rope_scaling.{field.name} is {told(value)}: it must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3RopeScaling:
    """Llama 3.1's frequency scaling: low frequencies are divided by `factor`, high ones kept."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    __post_init__ = _check


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearRopeScaling:
    """Every frequency is divided by `factor`."""

    factor: float

    __post_init__ = _check


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

    __post_init__ = _check


@dataclass(frozen=True, slots=True, kw_only=True)
class LongRopeScaling:
    """LongRoPE (Phi-3): each frequency is divided by a factor of its own, one set for short texts and one for long."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float | None = None

    __post_init__ = _check


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
