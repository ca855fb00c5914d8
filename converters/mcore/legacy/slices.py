"""A parameter cut into what each rank's file holds of it, and put together again; nothing is read.

A rank holds its boxes one below the other: of a gated pair its part of gate_proj, then its part of up_proj.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.layout import Box, Layout
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.tensors import LazyTensor, columns, join_columns, join_rows


@lru_cache(maxsize=1024)
def boxes_of(layout: Layout, shape: tuple[int, ...], config: ModelConfig, size: int) -> list[list[Box]]:
    """`Layout.boxes`, once for all parameters of a kind. Raises BadInputError when `size` does not divide the axis."""
    return layout.boxes(shape, config, size)


def slice_shape(boxes: Sequence[Box], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what a rank holds of a parameter of this shape."""
    held = sum(box.rows for box in boxes)
    return (held, *shape[1:]) if boxes[0].columns is None else (held, boxes[0].columns, *shape[2:])


def cut(tensor: LazyTensor, boxes: Sequence[Box]) -> LazyTensor:
    """What a rank holds of a parameter."""
    held = join_rows([tensor] * len(boxes), [(box.row, box.row + box.rows) for box in boxes])
    first = boxes[0]
    return held if first.columns is None else columns(held, first.column, first.column + first.columns)


def merge(parts: Sequence[LazyTensor], boxes: Sequence[Sequence[Box]]) -> LazyTensor:
    """The inverse of `cut`: what the ranks hold, in their order, as the whole parameter."""
    if len(parts) == 1:
        return parts[0]
    if boxes[0][0].columns is not None:
        return join_columns(parts)
    placed: list[tuple[int, LazyTensor, int, int]] = []
    for part, held in zip(parts, boxes, strict=True):
        at = 0
        for box in held:
            placed.append((box.row, part, at, at + box.rows))
            at += box.rows
    placed.sort(key=lambda entry: entry[0])
    return join_rows([part for _, part, _, _ in placed], [(low, high) for _, _, low, high in placed])


def whole_shape(
    layout: Layout, shape: tuple[int, ...], parts: Sequence[tuple[int, ...]], most_padding: int
) -> tuple[int, ...]:
    """The shape that parts of such shapes add up to: the expected one, a vocabulary's with less padding than that.

    Raises BadInputError when the rows are too few, or too many to be padding.
    """
    if not layout.is_vocab:
        return shape
    held = sum(part[0] for part in parts if part)
    if not 0 <= held - shape[0] < most_padding:
        raise BadInputError(f"{held} rows for a vocabulary of {shape[0]}")
    return (held, *shape[1:])
