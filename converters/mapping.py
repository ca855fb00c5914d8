"""A family is a table of rows; every row reads in both directions.

A row names one Megatron-Core parameter and the Hugging Face tensors it is packed from. `{layer}` and
`{expert}` are axes: they are counted when the table is resolved, and an axis is what Megatron's distributed
format stacks. A row that names `{expert}` is placed by expert parallelism and cut by expert tensor
parallelism; any other is cut by tensor parallelism. Where the HF tensors of such a row do not name it, one
tensor holds all experts of a layer, stacked along a first axis. A row that begins with `mtp.` is of a layer that
predicts further tokens: Megatron counts those from 0, Hugging Face goes on counting behind the last layer.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.fields import FieldRow
from ckptbridge.converters.fold import folded
from ckptbridge.converters.layout import COPY, Layout
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.shapes import mcore_shape
from ckptbridge.converters.tensors import Checkpoint, LazyTensor, join_rows, reshaped, rows

MTP = "mtp.layers."
"""What opens the names of layers that predict further tokens (multi-token prediction)."""

When = Callable[[ModelConfig, int], bool]
"""(config, layer) -> whether the row exists there; layer counts as Hugging Face does, and is 0 without {layer}."""


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
            if _placeholders(name) not in (want, want - {"expert"}):
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
    """Of a stack, with its first axis."""
    layer: int | None = None
    """The layer as Hugging Face counts: num_layers is the first of those that predict further tokens."""
    expert: int | None = None
    is_stacked: bool = False
    """The HF tensors hold all experts of the layer."""


@dataclass(frozen=True, slots=True)
class Copy:
    """A tensor of each layer that predicts further tokens, `hf`, which published files hold beside its equal, `of`."""

    hf: str
    of: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """An architecture: its table of parameters and its table of config fields.

    `ignored` are HF tensors that carry no weights of their own (the reason stands in the family's file).
    """

    name: str
    architecture: str
    params: tuple[Param, ...]
    fields: tuple[FieldRow, ...]
    no_hf_class: str = ""
    """Why transformers has no class of this architecture: its checkpoints are Megatron's only. Empty: it has one."""
    spellings: tuple[str, ...] = ()
    """Other names of the architecture in published files."""
    ignored: tuple[str, ...] = ()
    copies: tuple[Copy, ...] = ()
    """Left out on the way to Megatron, which shares the originals, and written again on the way back."""

    def moves(self, config: ModelConfig) -> Iterator[Move]:
        """Every parameter of a model of this config, layer by layer."""
        rows = [_Row(param, config) for param in self.params]
        for row in rows:
            if not row.has_layer and row.param.when(config, 0):
                yield row.move()
        for layer in range(config.num_layers + config.mtp_num_layers):
            for row in rows:
                if row.has_layer and row.is_mtp == (layer >= config.num_layers) and row.param.when(config, layer):
                    yield from row.moves(layer, config)

    def copied(self, config: ModelConfig) -> dict[str, str]:
        """{copy: original} of every copy in a model of this config."""
        further = range(config.num_layers, config.num_layers + config.mtp_num_layers)
        return {copy.hf.replace("{layer}", str(layer)): copy.of for layer in further for copy in self.copies}


class _Row:
    """A row of a table with what all of its moves share: their number goes into the tens of thousands."""

    def __init__(self, param: Param, config: ModelConfig) -> None:
        placeholders = _placeholders(param.mcore)
        self.param, self.has_layer, self.has_expert = param, "layer" in placeholders, "expert" in placeholders
        self.is_stacked = self.has_expert and all("expert" not in _placeholders(name) for name in param.hf_names)
        self.is_mtp = param.mcore.startswith(MTP)
        self.names = (param.mcore, *param.hf_names)
        self.shape = mcore_shape(param.mcore, config)
        stack = (config.num_moe_experts or 0,) if self.is_stacked else ()
        self.hf_shapes = tuple((*stack, *shape) for shape in param.layout.part_shapes(self.shape, config))

    def moves(self, layer: int, config: ModelConfig) -> Iterator[Move]:
        """The row's moves in one layer."""
        mcore, *hf = self.names
        own = layer - config.num_layers if self.is_mtp else layer
        names = (mcore.replace("{layer}", str(own)), *(name.replace("{layer}", str(layer)) for name in hf))
        if not self.has_expert:
            yield self.move(names, layer)
            return
        for expert in range(config.num_moe_experts or 0):
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
            is_stacked=self.is_stacked,
        )


def packed(family: Family, config: ModelConfig, hf: Checkpoint, where: str) -> dict[str, LazyTensor]:
    """HF tensors as Megatron-Core parameters, one name a layer and expert; nothing is read.

    Raises BadInputError, naming the tensors, when parts of one parameter have different dtypes.
    """
    made: dict[str, LazyTensor] = {}
    flat: dict[str, LazyTensor] = {}
    """Stacks as matrices under each other: what is cut from one of them has one base."""
    for move in family.moves(config):
        parts = [hf[name] for name in move.hf]
        if move.is_stacked:
            for name, stack in zip(move.hf, parts, strict=True):
                flat[name] = flat.get(name) or reshaped(stack, (prod(stack.shape[:2]), *stack.shape[2:]))
            heights = (shape[1] for shape in move.hf_shapes)
            parts = [_entry(flat[name], move.expert or 0, n) for name, n in zip(move.hf, heights, strict=True)]
        if len({part.dtype for part in parts}) > 1:
            told = ", ".join(f"{name} is {part.dtype}" for name, part in zip(move.hf, parts, strict=True))
            raise BadInputError(f"{where}: {told}; together they are one parameter of Megatron, so give them one dtype")
        made[move.name] = move.layout.pack(parts, config)
    return made


def unpacked(family: Family, config: ModelConfig, tensors: Checkpoint) -> dict[str, LazyTensor]:
    """Megatron-Core parameters as HF tensors; nothing is read."""
    hf: dict[str, LazyTensor] = {}
    stacks: dict[str, tuple[tuple[int, ...], list[LazyTensor]]] = {}
    for move in family.moves(config):
        parts = move.layout.unpack(tensors[move.name], config)
        hf.update(zip(move.hf, parts, strict=True))
        if move.is_stacked:
            for name, shape, part in zip(move.hf, move.hf_shapes, parts, strict=True):
                stacks.setdefault(name, (shape, []))[1].append(part)
    hf |= {name: reshaped(join_rows(parts), shape) for name, (shape, parts) in stacks.items()}
    return hf | {copy: hf[original] for copy, original in family.copied(config).items()}


def _entry(flat: LazyTensor, index: int, height: int) -> LazyTensor:
    return rows(flat, index * height, (index + 1) * height)


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
