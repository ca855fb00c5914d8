"""Whether a value from a file is what a field's annotation says: files hold words where numbers belong."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, cast

from ckptbridge.converters.errors import BadInputError, told

LARGEST = 1 << 48
"""No number in the description of a model is as large."""
_TYPES: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "None": (type(None),),
    "tuple[int, ...]": (tuple,),
    "tuple[float, ...]": (tuple,),
}


def check_kinds(record: Any, prefix: str = "", **others: tuple[type, ...]) -> None:
    """Raise BadInputError naming the first field of a dataclass that does not hold what its annotation says.

    Numbers are finite, tuples hold numbers only, and a bool is no number. `others` are the types behind names that
    only the dataclass knows, `prefix` goes before a field's name in the message.
    """
    for field in fields(record):
        _check(prefix + field.name, getattr(record, field.name), str(field.type), _TYPES | others)


def _check(name: str, value: Any, annotation: str, types: dict[str, tuple[type, ...]]) -> None:
    kinds = {kind for part in annotation.split(" | ") for kind in types[part]}
    if not isinstance(value, tuple(kinds)) or (isinstance(value, bool) and bool not in kinds):
        raise BadInputError(f"{name} is {told(value)}: expected {annotation}")
    if isinstance(value, int | float) and not abs(value) < LARGEST:  # nan is not either
        raise BadInputError(f"{name} is {told(value)}: no model has such a number")
    if isinstance(value, tuple):
        part = "int" if "tuple[int" in annotation else "float"
        for element in cast(tuple[Any, ...], value):
            _check(f"an element of {name}", element, part, types)
