"""Which layers become mixtures, from a word on the command line."""

from __future__ import annotations

import re

from ckptbridge.converters.errors import BadInputError

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_SLICE = re.compile(r"(\d*):(\d*)(?::(\d+))?")


def chosen_layers(words: str, num_layers: int) -> tuple[int, ...]:
    """A 1 for each layer that `words` names, a 0 for each other one.

    `words`: "all"; numbers and ranges with both ends ("0,2,4-7"); or a slice as Python's ("3:" leaves the first three
    dense, "1::2" takes every second). Raises BadInputError for other words, and for layers that do not exist.
    """
    if words == "all":
        return (1,) * num_layers
    chosen: set[int] = set()
    if found := _SLICE.fullmatch(words):
        start, stop, step = found.groups()
        if step and int(step) == 0:
            raise BadInputError(f"layers is {words!r}: its step is 0, and must be at least 1")
        chosen.update(range(num_layers)[int(start or 0) : int(stop or num_layers) : int(step or 1)])
    else:
        for word in words.split(","):
            found = _RANGE.fullmatch(word.strip())
            if found is None:
                raise BadInputError(
                    f"layers is {words!r}: expected all, numbers and ranges (0,2,4-7), or a slice (3: or 1::2)"
                )
            first, last = int(found[1]), int(found[2] or found[1])
            if last >= num_layers or first > last:
                raise BadInputError(f"layers is {words!r}, but the model has layers 0 to {num_layers - 1}")
            chosen.update(range(first, last + 1))
    if not chosen:
        raise BadInputError(f"layers is {words!r}: it names none of the model's {num_layers} layers")
    return tuple(int(layer in chosen) for layer in range(num_layers))
