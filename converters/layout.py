"""How Hugging Face tensors become one Megatron-Core tensor, and back.

A layout is three facts about the leading (row) dim: how the rows of each part are viewed, along which axis
of that view the parts meet, and which axis tensor parallelism cuts. Packing, unpacking and the boxes that a
rank owns follow from them, on tensors that have not been read. A layout never looks at names or ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.tensors import LazyTensor, join_rows, rows
from ckptbridge.converters.turned import EveryNth, InTurn, turned

View = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a packed tensor: rows [row, row + rows) of columns [column, column + columns)."""

    row: int
    rows: int
    column: int = 0
    columns: int | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """`views(config)[i]` is the row view of HF part i; parts meet along `join`, TP cuts `tp`.

    One entry of a view may be -1: it takes what the rows of the part leave. A `tp` equal to the view's
    length cuts the columns. A `tp` of None leaves every TP rank the whole.
    """

    name: str
    views: Callable[[ModelConfig], Sequence[View]] = lambda config: [(-1,)]
    join: int = 0
    tp: int | None = None
    is_vocab: bool = False
    """Rows are tokens: Megatron pads them and allows their number to differ."""
    whole: Literal["", "rows", "in turn"] = ""
    """The parts are one HF tensor: one below the other, or a row of each in turn (parts of one shape)."""
    is_turned: bool = False
    """HF holds matrices [inputs, outputs]: with rows and columns exchanged."""

    def pack(self, parts: Sequence[LazyTensor], config: ModelConfig) -> LazyTensor:
        """HF parts -> the one Megatron-Core tensor, unsplit."""
        if self.is_turned:
            parts = [turned(part) for part in parts]
        if self.whole:
            parts = self._apart(parts[0], config)
        if len(parts) == 1:
            return parts[0]
        views = [_resolve(v, p.shape[0]) for v, p in zip(self.views(config), parts, strict=True)]
        blocks = [prod(view[self.join :]) for view in views]
        groups = prod(views[0][: self.join])
        pieces = [(p, (g * b, (g + 1) * b)) for g in range(groups) for p, b in zip(parts, blocks, strict=True)]
        return join_rows([p for p, _ in pieces], [r for _, r in pieces])

    def unpack(self, packed: LazyTensor, config: ModelConfig) -> list[LazyTensor]:
        """The inverse of `pack`: the one Megatron-Core tensor -> HF parts."""
        blocks, groups = self._blocks(packed.shape[0], config)
        starts = [sum(blocks[:i]) for i in range(len(blocks))]
        stride = sum(blocks)
        parts = (
            [packed]
            if len(blocks) == 1
            else [
                join_rows([packed] * groups, [(g * stride + s, g * stride + s + b) for g in range(groups)])
                for s, b in zip(starts, blocks, strict=True)
            ]
        )
        if self.whole:
            parts = [InTurn(parts) if self.whole == "in turn" else join_rows(parts)]
        return [turned(part) for part in parts] if self.is_turned else parts

    def part_shapes(self, shape: tuple[int, ...], config: ModelConfig) -> list[tuple[int, ...]]:
        """The shapes of the HF parts of a packed tensor of this shape."""
        blocks, groups = self._blocks(shape[0], config)
        shapes = [(groups * b, *shape[1:]) for b in ([sum(blocks)] if self.whole else blocks)]
        return [part[::-1] for part in shapes] if self.is_turned else shapes

    def boxes(self, shape: tuple[int, ...], config: ModelConfig, tp_size: int) -> list[list[Box]]:
        """What each TP rank owns of a packed tensor of this shape: boxes in ascending order.

        Even at TP 1 a gated pair is two boxes, gate_proj and up_proj, as Megatron-Core saves it.
        Raises BadInputError when the degree does not divide the axis.
        """
        if self.tp is None:
            return [[Box(0, shape[0])] for _ in range(tp_size)]
        blocks, groups = self._blocks(shape[0], config)
        first = list(_resolve(self.views(config)[0], groups * blocks[0]))
        first[self.join] *= len(blocks) if len(set(blocks)) == 1 else 1
        view = tuple(first)
        if self.tp >= len(view):
            width = self._divide(shape[1], tp_size, "columns")
            return [[Box(0, shape[0], r * width, width)] for r in range(tp_size)]
        outer = prod(view[: self.tp])
        count = view[self.tp]
        step = self._divide(count, tp_size, self._axis_name()) * (shape[0] // (outer * count))
        return [[Box(o * (shape[0] // outer) + r * step, step) for o in range(outer)] for r in range(tp_size)]

    def _apart(self, whole: LazyTensor, config: ModelConfig) -> list[LazyTensor]:
        blocks, groups = self._blocks(whole.shape[0], config)
        if self.whole == "in turn":
            return [EveryNth(whole, number, len(blocks)) for number in range(len(blocks))]
        ends = [groups * sum(blocks[: i + 1]) for i in range(len(blocks))]
        return [rows(whole, end - groups * b, end) for end, b in zip(ends, blocks, strict=True)]

    def _blocks(self, packed_rows: int, config: ModelConfig) -> tuple[list[int], int]:
        views = self.views(config)
        if len(views) == 1:
            return [packed_rows], 1
        groups = prod(views[0][: self.join])
        tails = [view[self.join :] for view in views]
        if any(-1 in tail for tail in tails):
            return [packed_rows // groups // len(views)] * len(views), groups
        return [prod(tail) for tail in tails], groups

    def _divide(self, count: int, tp_size: int, what: str) -> int:
        if count % tp_size:
            raise BadInputError(f"{what}: {count} does not split over a tensor parallel size of {tp_size}")
        return count // tp_size

    def _axis_name(self) -> str:
        return {"qkv": "num_query_groups", "vocab": "padded vocabulary rows"}.get(self.name, "rows")


def _resolve(view: View, rows: int) -> View:
    known = prod(v for v in view if v != -1)
    if rows % known or (-1 not in view and rows != known):
        raise BadInputError(f"{rows} rows cannot be viewed as {view}")
    return tuple(rows // known if v == -1 else v for v in view)


def _qkv_views(config: ModelConfig) -> Sequence[View]:
    return [(config.num_query_groups, heads, config.kv_channels) for heads in (config.heads_per_group, 1, 1)]


COPY = Layout("copy")
"""Norms, the router: every TP rank holds the whole."""
COLUMN = Layout("column", tp=0)
"""Output features are cut."""
ROW = Layout("row", tp=1)
"""Input features are cut."""
VOCAB = Layout("vocab", tp=0, is_vocab=True)
"""Embedding and output layer: rows are tokens, padded and cut."""
GATED = Layout("gated", views=lambda config: [(1, -1), (1, -1)], tp=1)
"""[gate_proj; up_proj]: each half is cut."""
QKV = Layout("qkv", views=_qkv_views, join=1, tp=0)
"""For each query group its query heads, its key head, its value head: groups are cut."""

ROW_TURNED = replace(ROW, is_turned=True)
GATED_WHOLE = replace(GATED, whole="rows")
"""gate_proj and up_proj are one HF tensor, one below the other."""
GATED_IN_TURN = replace(GATED, whole="in turn")
"""A row of gate_proj, a row of up_proj, and so on."""
GATED_COLUMNS_IN_TURN = replace(GATED_IN_TURN, is_turned=True)
"""The same of columns: HF holds [inputs, outputs]."""
QKV_WHOLE = replace(QKV, whole="rows")
"""All queries, then all keys, then all values in one HF tensor."""
