"""A family is a table of rows; every row reads in both directions.

A row names one Megatron-Core parameter and the Hugging Face tensors it is packed from. `{layer}` and
`{expert}` are axes: they are counted when the table is resolved, and an axis is what Megatron's distributed
format stacks. A row that names `{expert}` is placed by expert parallelism and cut by expert tensor
parallelism; any other is cut by tensor parallelism.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.fields import FieldRow
from ckptbridge.converters.fold import folded
from ckptbridge.converters.layout import COPY, Layout
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.shapes import mcore_shape
from ckptbridge.converters.tensors import Checkpoint, LazyTensor

When = Callable[[ModelConfig, int], bool]
"""(config, layer) -> whether the row exists there; layer is 0 for rows without {layer}."""


@dataclass(frozen=True, slots=True)
class Param:
    """One row: `mcore` is packed from the `hf` tensors by `layout`, where `when` says so."""

    mcore: str
    hf: str | tuple[str, ...]
    layout: Layout = COPY
    when: When = lambda config, layer: True

    def __post_init__(self) -> None:
        want = _placeholders(self.mcore)
        for name in self.hf_names:
            if _placeholders(name) != want:
                raise ValueError(
                    f"{self.mcore!r} names {sorted(want)}, but {name!r} names {sorted(_placeholders(name))}"
                )

    @property
    def hf_names(self) -> tuple[str, ...]:
        return (self.hf,) if isinstance(self.hf, str) else self.hf


@dataclass(frozen=True, slots=True)
class Move:
    """One resolved row: concrete names and shapes, nothing read yet."""

    name: str
    """The parameter's name with its layer and expert numbers, e.g. decoder.layers.3.mlp.router.weight."""
    hf: tuple[str, ...]
    layout: Layout
    shape: tuple[int, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    layer: int | None = None
    expert: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """An architecture: its table of parameters and its table of config fields.

    `ignored` are HF tensors that carry no weights of their own (the reason stands in the family's file).
    """

    name: str
    architecture: str
    params: tuple[Param, ...]
    fields: tuple[FieldRow, ...]
    ignored: tuple[str, ...] = ()

    def moves(self, config: ModelConfig) -> Iterator[Move]:
        """Every parameter of a model of this config, layer by layer."""
        rows = [_Row(param, config) for param in self.params]
        for row in rows:
            if not row.has_layer and row.param.when(config, 0):
                yield row.move()
        for layer in range(config.num_layers):
            for row in rows:
                if row.has_layer and row.param.when(config, layer):
                    yield from row.moves(layer, config.num_moe_experts or 0)


class _Row:
    """A row of a table with what all of its moves share: their number goes into the tens of thousands."""

    def __init__(self, param: Param, config: ModelConfig) -> None:
        placeholders = _placeholders(param.mcore)
        self.param, self.has_layer, self.has_expert = param, "layer" in placeholders, "expert" in placeholders
        self.names = (param.mcore, *param.hf_names)
        self.shape = mcore_shape(param.mcore, config)
        self.hf_shapes = tuple(param.layout.part_shapes(self.shape, config))

    def moves(self, layer: int, num_experts: int) -> Iterator[Move]:
        """The row's moves in one layer."""
        names = tuple(name.replace("{layer}", str(layer)) for name in self.names)
        if not self.has_expert:
            yield self.move(names, layer)
            return
        for expert in range(num_experts):
            yield self.move(tuple(name.replace("{expert}", str(expert)) for name in names), layer, expert)

    def move(self, names: tuple[str, ...] = (), layer: int | None = None, expert: int | None = None) -> Move:
        """The row as a move of these names; without any, the row's own."""
        mcore, *hf = names or self.names
        return Move(
            name=mcore,
            hf=tuple(hf),
            layout=self.param.layout,
            shape=self.shape,
            hf_shapes=self.hf_shapes,
            layer=layer,
            expert=expert,
        )


def packed(family: Family, config: ModelConfig, hf: Checkpoint, where: str) -> dict[str, LazyTensor]:
    """HF tensors as Megatron-Core parameters, one name a layer and expert; nothing is read.

    Raises BadInputError, naming the tensors, when parts of one parameter have different dtypes.
    """
    made: dict[str, LazyTensor] = {}
    for move in family.moves(config):
        parts = [hf[name] for name in move.hf]
        if len({part.dtype for part in parts}) > 1:
            told = ", ".join(f"{name} is {part.dtype}" for name, part in zip(move.hf, parts, strict=True))
            raise BadInputError(f"{where}: {told}; together they are one parameter of Megatron, so give them one dtype")
        made[move.name] = move.layout.pack(parts, config)
    return made


def unpacked(family: Family, config: ModelConfig, tensors: Checkpoint) -> dict[str, LazyTensor]:
    """Megatron-Core parameters as HF tensors; nothing is read."""
    hf: dict[str, LazyTensor] = {}
    for move in family.moves(config):
        hf.update(zip(move.hf, move.layout.unpack(tensors[move.name], config), strict=True))
    return hf


def check_names_and_shapes(
    expected: Mapping[str, tuple[int, ...]], found: Checkpoint, where: str, ignored: Iterable[str] = ()
) -> None:
    """Compare every name and shape at once, from headers alone.

    Raises BadInputError that lists all offenders, layers folded: {0...47}.
    """
    skip = set(ignored)
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected and name not in skip]
    wrong = {n: s for n, s in expected.items() if n in found and tuple(found[n].shape) != tuple(s)}
    if not (missing or unexpected or wrong):
        return
    lines = [f"{where}: the tensors do not fit the config, so nothing was written"]
    if missing:
        lines.append(f"  {len(missing)} missing: " + ", ".join(folded(missing)[:12]))
    if unexpected:
        lines.append(f"  {len(unexpected)} unexpected: " + ", ".join(folded(unexpected)[:12]))
    for name, shape in list(wrong.items())[:12]:
        lines.append(f"  {name}: expected shape {list(shape)} from the config, found {list(found[name].shape)}")
    if len(wrong) > 12:
        lines.append(f"  ... and {len(wrong) - 12} more with a shape that the config contradicts")
    lines.append("  The folder mixes two models, or its config.json is not its own. Try: ckptbridge inspect")
    raise BadInputError("\n".join(lines))


def _placeholders(template: str) -> set[str]:
    return {field for _, field, _, _ in string.Formatter().parse(template) if field}
