"""Names of many layers told in a line: `layers.0.x ... layers.47.x` becomes `layers.{0...47}.x`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import prod

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def folded(names: Iterable[str]) -> list[str]:
    """The names with runs of numbers folded, in order of first appearance."""
    groups: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for name in names:
        groups.setdefault(tuple(_NUMBER.split(name)), []).append(tuple(int(n) for n in _NUMBER.findall(name)))
    return [_fold(words, numbers) for words, numbers in groups.items()]


def _fold(words: tuple[str, ...], numbers: list[tuple[int, ...]]) -> str:
    axes = [sorted(set(axis)) for axis in zip(*numbers, strict=True)]
    if prod(len(axis) for axis in axes) == len(set(numbers)):
        return "".join(word + told for word, told in zip(words, [*map(_ranges, axes), ""], strict=True))
    # Not a full grid: say each first number's own set rather than name tensors that are not meant.
    head, *tail = words
    return ", ".join(
        head + str(first) + _fold(tuple(tail), [n[1:] for n in numbers if n[0] == first]) for first in axes[0]
    )


def _ranges(values: list[int]) -> str:
    if len(values) == 1:
        return str(values[0])
    runs: list[list[int]] = []
    for value in values:
        if runs and runs[-1][1] + 1 == value:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return "{" + ",".join(str(a) if a == b else f"{a}...{b}" for a, b in runs) + "}"
