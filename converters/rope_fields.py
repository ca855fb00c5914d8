"""The fields of config.json about rotary embedding, in both of their spellings.

transformers 5 writes one dict, `rope_parameters`; published files have `rope_theta` and `rope_scaling`, and stand
`partial_rotary_factor` beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from ckptbridge.converters.errors import BadInputError, NotSupportedError, told
from ckptbridge.converters.field_kinds import LARGEST
from ckptbridge.converters.fields import FieldRow, Json
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.rope_scaling import (
    KINDS,
    LinearRopeScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    RopeScaling,
    YarnRopeScaling,
    kind_of,
)

ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True)
class Rope(FieldRow):
    """Rotary embedding: the base, how frequencies are scaled, and which part of a head turns."""

    default_theta: float = 10000.0
    kinds: tuple[str, ...] = ("default", *KINDS)
    """The `rope_type`s that the class computes."""
    partial: float | None = None
    """`partial_rotary_factor` where the file names none; None for classes that read no such field."""
    rotary_dim: str = ""
    """A field that tells the same in channels, if the class has one; `head_dim` is theirs then."""
    has_mscales: bool = False
    """The class takes its attention factor from `short_mscale` and `long_mscale`, one for each set of factors."""
    original_beside: bool = False
    """The class has a field of its own for the length of the first training, which goes before that in the dict."""

    @property
    def hf_names(self) -> tuple[str, ...]:
        names = ("rope_theta", "rope_scaling", "rope_parameters")
        names += ("partial_rotary_factor",) if self.partial is not None else ()
        names += (self.rotary_dim,) if self.rotary_dim else ()
        return names + ((ORIGINAL,) if self.original_beside else ())

    def to_mcore(self, hf: Json) -> Json:
        rope: Json = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
        theta = rope.pop("rope_theta", None) or hf.get("rope_theta") or self.default_theta
        kind = rope.pop("rope_type", None) or rope.get("type") or "default"
        rope.pop("type", None)
        values: Json = {"rotary_base": float(theta)}
        if self.partial is not None:
            inside, beside = rope.pop("partial_rotary_factor", None), hf.get("partial_rotary_factor")
            channels = hf.get(self.rotary_dim) if self.rotary_dim else None
            told_there = (inside, beside, None if channels is None else channels / hf["head_dim"])
            values["rotary_percent"] = next((v for v in told_there if v is not None), self.partial)
        if self.original_beside:
            rope[ORIGINAL] = hf.get(ORIGINAL) or rope.get(ORIGINAL)
        if self.has_mscales:
            short, long = (rope.pop(f"{name}_mscale", None) for name in ("short", "long"))
            if short != long:
                raise NotSupportedError(
                    f"config.json: short_mscale is {told(short)} and long_mscale {told(long)}; only one for both "
                    "lengths is supported"
                )
            rope["attention_factor"] = short
        return values | {"rope_scaling": read_scaling(kind, rope, hf, self.kinds)}

    def to_hf(self, config: ModelConfig) -> Json:
        rope: Json = {"rope_theta": config.rotary_base, **write_scaling(config.rope_scaling, self.kinds)}
        if self.has_mscales and (factor := rope.pop("attention_factor", None)) is not None:
            rope |= {"short_mscale": factor, "long_mscale": factor}
        if self.partial is not None:
            rope["partial_rotary_factor"] = config.rotary_percent
        written: Json = {"rope_parameters": rope}
        if self.rotary_dim:
            written[self.rotary_dim] = config.rotary_dim
        elif self.partial is not None and config.rotary_percent != 1.0:
            written["partial_rotary_factor"] = config.rotary_percent
        if self.original_beside and ORIGINAL in rope:
            written[ORIGINAL] = rope[ORIGINAL]
        return written


def read_scaling(kind: Any, rope: Json, hf: Json, kinds: tuple[str, ...]) -> RopeScaling | None:
    """The scaling that a dict of this `rope_type` describes; `hf` is the whole config.json.

    Raises NotSupportedError for a kind that is not among `kinds`, and for entries that the kind does not read.
    """
    if kind == "su" and "longrope" in kinds:
        kind = "longrope"  # its name in the first files of Phi-3
    if not isinstance(kind, str) or kind not in kinds:
        known = ", ".join(map(repr, kinds))
        raise NotSupportedError(f"config.json: rope_type {told(kind)} is not supported; known here: {known}")
    given = {name: value for name, value in rope.items() if value is not None}
    if kind == "default":
        given.pop(ORIGINAL, None)
        scaling = None
    else:
        scaling = _READERS[kind](given, hf)
    if given:
        raise NotSupportedError(f"config.json: rope_parameters holds {given}, which rope_type {kind!r} does not read")
    return scaling


def write_scaling(scaling: RopeScaling | None, kinds: tuple[str, ...]) -> Json:
    """`rope_type` and what belongs to it. Raises NotSupportedError for a kind that is not among `kinds`."""
    kind = "default" if scaling is None else kind_of(scaling)
    if kind not in kinds:
        raise NotSupportedError(f"rope_scaling is {scaling}, which this Hugging Face class cannot express")
    written: Json = {"rope_type": kind}
    for name in () if scaling is None else scaling.__slots__:
        value = getattr(scaling, name)
        if value is None or (name == "truncate" and value):
            continue  # the class assumes the same where they are missing
        written[name] = list(cast(tuple[float, ...], value)) if isinstance(value, tuple) else value
    return written


def _llama3(rope: Json, hf: Json) -> RopeScaling:
    names = ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL)
    if set(rope) != set(names):
        raise BadInputError(f"config.json: rope_type 'llama3' needs exactly {names}, found {tuple(rope)}")
    original = _whole(rope, names[-1])
    factor, low, high = (_number(rope, name) for name in names[:-1])
    return Llama3RopeScaling(
        factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_position_embeddings=original
    )


def _linear(rope: Json, hf: Json) -> RopeScaling:
    return LinearRopeScaling(factor=_number(rope, "factor"))


def _yarn(rope: Json, hf: Json) -> RopeScaling:
    original = _original(rope, hf)
    return YarnRopeScaling(
        factor=_number(rope, "factor"),
        original_max_position_embeddings=original,
        beta_fast=_number(rope, "beta_fast", 0.0) or 32.0,
        beta_slow=_number(rope, "beta_slow", 0.0) or 1.0,
        mscale=_optional(rope, "mscale"),
        mscale_all_dim=_optional(rope, "mscale_all_dim"),
        attention_factor=_optional(rope, "attention_factor"),
        truncate=rope.pop("truncate", True),
    )


def _longrope(rope: Json, hf: Json) -> RopeScaling:
    original = _original(rope, hf)
    stretch = _stretch(hf, original)
    factor, attention_factor = _number(rope, "factor", stretch), _optional(rope, "attention_factor")
    if attention_factor is None and factor != stretch:
        attention_factor = math.sqrt(1 + math.log(max(factor, 1.0)) / math.log(original))
    return LongRopeScaling(
        short_factor=_numbers(rope, "short_factor"),
        long_factor=_numbers(rope, "long_factor"),
        original_max_position_embeddings=original,
        attention_factor=attention_factor,
    )


_READERS: dict[str, Callable[[Json, Json], RopeScaling]] = {
    "llama3": _llama3,
    "linear": _linear,
    "yarn": _yarn,
    "longrope": _longrope,
}
"""Each takes what it reads out of the dict."""


def _original(rope: Json, hf: Json) -> int:
    """The length of the first training: that of the model where the dict names none."""
    return _whole(rope, ORIGINAL, _number(dict(hf), "max_position_embeddings", 4096))


def _stretch(hf: Json, original: int) -> float:
    return _number(dict(hf), "max_position_embeddings", original) / original


def _number(rope: Json, name: str, default: float | None = None) -> float:
    value = rope.pop(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadInputError(f"config.json: {name} of the rotary embedding is {told(value)}: expected a number")
    return value


def _whole(rope: Json, name: str, default: float | None = None) -> int:
    """A whole number from 1; some files have it as 8192.0."""
    value = _number(rope, name, default)
    if not 1 <= value < LARGEST or value != int(value):
        raise BadInputError(f"config.json: {name} of the rotary embedding is {told(value)}: expected a number from 1")
    return int(value)


def _optional(rope: Json, name: str) -> float | None:
    return _number(rope, name) if name in rope else None


def _numbers(rope: Json, name: str) -> tuple[float, ...]:
    found = rope.pop(name, None)
    if not isinstance(found, list):
        raise BadInputError(f"config.json: {name} of the rotary embedding is {told(found)}: expected a list")
    values = cast(list[Any], found)
    return tuple(_number({name: value}, name) for value in values)
