"""What a parameter is called inside a rank's model, in each dialect that Megatron has spoken; both directions.

Parameters carry the names of Transformer Engine's modules everywhere else. In memory, and so in legacy files, layers
and experts are counted from 0 on every rank, modules without Transformer Engine keep their norms apart, and the
oldest ones say `query_key_value` and `dense_h_to_4h`. The order of a dialect's table is that of the modules' own
state dicts (megatron-core 0.19): optimizers lay their flat buffers out by it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ckptbridge.converters.errors import NotSupportedError
from ckptbridge.converters.mapping import MTP, Family
from ckptbridge.converters.model_config import ModelConfig

Dialect = Literal["te", "te-sequential", "local", "oldest"]
DIALECTS: tuple[Dialect, ...] = get_args(Dialect)
EMBEDDING, HEAD, HEAD_BIAS = "embedding.word_embeddings.weight", "output_layer.weight", "output_layer.bias"
FINAL_NORM, FINAL_NORM_BIAS = "decoder.final_layernorm.weight", "decoder.final_layernorm.bias"
_EXPERT = "mlp.experts.experts."
_LEAVES = ("layer_norm_weight", "layer_norm_bias", "weight", "bias")


@dataclass(frozen=True, slots=True)
class Slot:
    """An entry of a rank's model: `name` is the parameter, by the whole model's numbers, or None for extra state."""

    key: str
    name: str | None


@dataclass(frozen=True, slots=True)
class _Module:
    """A module of a layer: `canonical` are the places whose leaves it holds, of which a layer has one."""

    path: str
    canonical: tuple[str, ...]
    leaves: tuple[str, ...] = _LEAVES
    extra_state: bool = True

    def held(self, suffixes: Iterable[str]) -> Iterator[tuple[str, str]]:
        """(leaf, parameter within the layer) of what is there, in order."""
        for leaf in self.leaves:
            for place in self.canonical:
                if (name := f"{place}{leaf}") in suffixes:
                    yield leaf, name


def _same(path: str, *leaves: str, extra_state: bool = True) -> _Module:
    return _Module(path, (f"{path}.",), leaves or _LEAVES, extra_state)


def _bare(path: str, *canonical: str) -> _Module:
    """A module without extra state, called otherwise than the places whose leaves it holds."""
    return _Module(path, canonical, ("weight", "bias"), extra_state=False)


_EXPERTS = "experts"
"""Where the experts stand in a layer."""

_MLP: tuple[_Module | str, ...] = (
    _same("mlp.linear_fc1"),
    _same("mlp.linear_fc2"),
    _same("mlp.linear_fc2.post_layernorm", "weight", "bias"),
    _same("mlp.router", "weight", "bias", "expert_bias", extra_state=False),
    _EXPERTS,
    _same("mlp.shared_experts", "gate_weight", extra_state=False),
    _same("mlp.shared_experts.linear_fc1"),
    _same("mlp.shared_experts.linear_fc2"),
)
_LATENT = tuple(
    f"self_attention.linear_{name}" for name in ("q_proj", "q_down_proj", "q_up_proj", "kv_down_proj", "kv_up_proj")
)
_FUSED: tuple[_Module | str, ...] = (
    _same("input_layernorm"),
    _same("self_attention.core_attention", "softmax_offset"),
    _same("self_attention.linear_proj"),
    _same("self_attention.linear_proj.post_layernorm", "weight", "bias"),
    _same("self_attention.linear_qkv"),
    *(_same(path) for path in _LATENT),
    _same("self_attention.q_layernorm"),
    _same("self_attention.k_layernorm"),
    _same("pre_mlp_layernorm"),
    *_MLP,
)
_APART: tuple[_Module | str, ...] = (
    _bare("input_layernorm", "input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    _same("self_attention.core_attention", "softmax_offset", extra_state=False),
    _same("self_attention.linear_proj", "weight", "bias"),
    _bare("self_attention.linear_proj.post_layernorm", "self_attention.linear_proj.post_layernorm."),
    _same("self_attention.linear_qkv", "weight", "bias"),
    *(_same(path, "weight", "bias") for path in _LATENT),
    _bare("self_attention.q_layernorm", "self_attention.q_layernorm.", "self_attention.linear_q_up_proj.layer_norm_"),
    _bare("self_attention.k_layernorm", "self_attention.k_layernorm."),
    _bare("self_attention.kv_layernorm", "self_attention.linear_kv_up_proj.layer_norm_"),
    _bare("pre_mlp_layernorm", "pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
    *(
        _same(m.path, *(leaf for leaf in m.leaves if not leaf.startswith("layer_norm")), extra_state=m.extra_state)
        if isinstance(m, _Module)
        else m
        for m in _MLP
    ),
)
_OLDEST: tuple[_Module | str, ...] = (
    _bare("input_layernorm", "self_attention.linear_qkv.layer_norm_"),
    _bare("self_attention.query_key_value", "self_attention.linear_qkv."),
    _bare("self_attention.dense", "self_attention.linear_proj."),
    _bare("post_attention_layernorm", "mlp.linear_fc1.layer_norm_"),
    _bare("mlp.dense_h_to_4h", "mlp.linear_fc1."),
    _bare("mlp.dense_4h_to_h", "mlp.linear_fc2."),
)
_TABLES: Mapping[Dialect, tuple[_Module | str, ...]] = {
    "te": _FUSED,
    "te-sequential": _FUSED,
    "local": _APART,
    "oldest": _OLDEST,
}


@dataclass(frozen=True, slots=True)
class Stock:
    """A model's parameters, sorted as ranks hold them: those of each layer, of one expert of the layer, the rest.

    `further` counts the layers that predict further tokens: they stand behind the others, without what only they have.
    """

    layers: tuple[frozenset[str], ...]
    experts: tuple[tuple[str, ...], ...]
    ends: frozenset[str]
    further: int = 0


def stock_of(family: Family, config: ModelConfig) -> Stock:
    """Every parameter of a model, by place."""
    count = config.num_layers + config.mtp_num_layers
    layers: list[set[str]] = [set() for _ in range(count)]
    experts: list[list[str]] = [[] for _ in range(count)]
    ends: set[str] = set()
    for move in family.moves(config):
        if move.layer is None:
            ends.add(move.name)
            continue
        place = _place_of(move.layer, config.num_layers)
        suffix = move.name.removeprefix(place)
        if not move.name.startswith(place):
            ends.add(move.name)
        elif move.expert is None:
            layers[move.layer].add(suffix)
        elif move.expert == 0:
            experts[move.layer].append(suffix.removeprefix(f"{_EXPERT}0."))
    return Stock(tuple(map(frozenset, layers)), tuple(map(tuple, experts)), frozenset(ends), config.mtp_num_layers)


def _place_of(layer: int, num_layers: int) -> str:
    """What the names of a layer's parameters begin with."""
    if layer < num_layers:
        return f"decoder.layers.{layer}."
    return f"{MTP}{layer - num_layers}.transformer_layer."


def chunk_slots(
    dialect: Dialect, stock: Stock, layers: range, experts: range, *, first: bool, last: bool
) -> list[Slot]:
    """What one rank's model, or one chunk of it, holds: its `layers` and `experts`, and the ends where it has them.

    Raises NotSupportedError naming a parameter for which the dialect has no name.
    """
    oldest = dialect == "oldest"
    root, stack = ("language_model.", "language_model.encoder.") if oldest else ("", "decoder.")
    slots: list[Slot] = []
    if first or (last and stock.further):
        slots.append(Slot(root + EMBEDDING, EMBEDDING))
    for local, layer in enumerate(layers):
        slots += _layer_slots(dialect, stock, f"{stack}layers.{local}.", layer, experts)
    if last:
        slots.append(Slot(f"{stack}final_layernorm.weight", FINAL_NORM))
        if FINAL_NORM_BIAS in stock.ends:
            slots.append(Slot(f"{stack}final_layernorm.bias", FINAL_NORM_BIAS))
        if dialect in ("te", "te-sequential"):
            slots.append(Slot("decoder.final_layernorm._extra_state", None))
        for number in range(stock.further):
            slots += _further_slots(dialect, stock, number, experts)
        if HEAD in stock.ends:
            slots.append(Slot(root + HEAD, HEAD))
            if HEAD_BIAS in stock.ends:
                slots.append(Slot(root + HEAD_BIAS, HEAD_BIAS))
        elif not first:  # tied: the last stage computes with a copy
            slots.append(Slot("word_embeddings_for_head.weight" if oldest else HEAD, EMBEDDING))
        if not oldest:
            slots.append(Slot("output_layer._extra_state", None))
    return slots


def _further_slots(dialect: Dialect, stock: Stock, number: int, experts: range) -> list[Slot]:
    """A layer that predicts a further token: the last stage has all of them."""
    slots: list[Slot] = []

    def own(module: str, has_extra_state: bool) -> None:
        slots.append(Slot(f"{MTP}{number}.{module}.weight", f"{MTP}{number}.{module}.weight"))
        if has_extra_state:
            slots.append(Slot(f"{MTP}{number}.{module}._extra_state", None))

    is_fused, layer = dialect in ("te", "te-sequential"), len(stock.layers) - stock.further + number
    own("enorm", is_fused)
    own("hnorm", is_fused)
    own("eh_proj", True)
    slots += _layer_slots(dialect, stock, f"{MTP}{number}.mtp_model_layer.", layer, experts)
    own("final_layernorm", is_fused)
    return slots


def _layer_slots(dialect: Dialect, stock: Stock, prefix: str, layer: int, experts: range) -> list[Slot]:
    slots: list[Slot] = []
    suffixes, whole = stock.layers[layer], _place_of(layer, len(stock.layers) - stock.further)
    for module in _TABLES[dialect]:
        if isinstance(module, str):
            slots += _expert_slots(dialect, stock.experts[layer], f"{prefix}mlp.experts.", f"{whole}{_EXPERT}", experts)
            continue
        found = list(module.held(suffixes))
        slots += [Slot(f"{prefix}{module.path}.{leaf}", whole + name) for leaf, name in found]
        if module.extra_state and (found or module.path.endswith("core_attention")):
            slots.append(Slot(f"{prefix}{module.path}._extra_state", None))
    unnamed = {whole + name for name in suffixes} - {slot.name for slot in slots}
    if dialect == "oldest" and stock.experts[layer]:
        unnamed.add(f"{whole}{_EXPERT}0.{stock.experts[layer][0]}")
    if unnamed:
        raise NotSupportedError(
            f"the {dialect!r} names of Megatron's modules have none for {min(unnamed)}; other names: "
            + ", ".join(other for other in DIALECTS if other != dialect)
        )
    return slots


def _expert_slots(dialect: Dialect, matrices: Sequence[str], prefix: str, whole: str, experts: range) -> Iterator[Slot]:
    """Grouped experts lie module by module, sequential ones expert by expert; an expert's bias behind its matrix.

    So Transformer Engine registers them (2.20, pytorch/module/grouped_linear.py), and flat buffers follow.
    """
    modules: dict[str, list[str]] = {}
    for matrix in matrices:
        modules.setdefault(matrix.rpartition(".")[0], []).append(matrix)
    if dialect == "te":
        for module, leaves in modules.items():
            for local, expert in enumerate(experts):
                for leaf in leaves:
                    yield Slot(f"{prefix}{leaf}{local}", f"{whole}{expert}.{leaf}")
            yield Slot(f"{prefix}{module}._extra_state", None)
        return
    for local, expert in enumerate(experts):
        for module, leaves in modules.items():
            for leaf in leaves:
                yield Slot(f"{prefix}local_experts.{local}.{leaf}", f"{whole}{expert}.{leaf}")
            yield Slot(f"{prefix}local_experts.{local}.{module}._extra_state", None)


@dataclass(frozen=True, slots=True)
class Spelled:
    """A key of a rank's model, understood. `candidates` are the parameters that it may be, likeliest first.

    Layers and experts in them stand as {layer} and {expert}: their local numbers are `layer` and `expert`.
    """

    candidates: tuple[str, ...]
    layer: int | None = None
    expert: int | None = None
    is_every_expert: bool = False
    """The tensor holds all experts of the rank, one behind the other, each transposed: the former GroupedMLP."""


_LAYER = re.compile(r"(?:decoder|encoder|transformer)\.layers\.(\d{1,9})\.(.+)")
_FURTHER = re.compile(r"mtp\.layers\.(\d{1,9})\.(?:mtp_model_layer|transformer_layer)\.(.+)")
_ONE_BY_ONE = re.compile(r"mlp\.experts\.local_experts\.(\d{1,9})\.(.+)")
_GROUPED = re.compile(r"mlp\.experts\.(linear_fc[12]\.(?:weight|bias))(\d{1,9})")
_FORMER_GROUPED = re.compile(r"mlp\.experts\.weight([12])")
_IGNORED = re.compile(r"(^|\.)(_extra_state\d*|inv_freq)$")
_FINAL = re.compile(r"(?:decoder|encoder|transformer)\.final_(?:layer)?norm\.(weight|bias)")
_HEADS = (HEAD, "word_embeddings_for_head.weight")


def _spellings() -> dict[str, tuple[str, ...]]:
    """{key within a layer: parameters within a layer} over all dialects."""
    made: dict[str, tuple[str, ...]] = {}
    for module in (*_FUSED, *_APART, *_OLDEST):
        if isinstance(module, _Module):
            for leaf in module.leaves:
                names = (*made.get(f"{module.path}.{leaf}", ()), *(place + leaf for place in module.canonical))
                made[f"{module.path}.{leaf}"] = tuple(dict.fromkeys(names))
    for leaf in ("weight", "bias"):  # Megatron-LM of 2023 and 2024
        made[f"input_norm.{leaf}"] = made[f"input_layernorm.{leaf}"]
        made[f"post_attention_norm.{leaf}"] = made[f"post_attention_layernorm.{leaf}"]
    return made


_SPELLINGS = _spellings()


def spelled(key: str) -> Spelled | None:
    """What a key of a rank's model means, in whatever dialect; None for what carries no weights.

    Keys that no dialect has are taken for parameters of their own name.
    """
    key = key.removeprefix("module.").removeprefix("module.").removeprefix("language_model.")
    if _IGNORED.search(key):
        return None
    if key in _HEADS:
        return Spelled((HEAD, EMBEDDING))
    if hit := _FINAL.fullmatch(key):
        return Spelled((f"decoder.final_layernorm.{hit[1]}",))
    if further := _FURTHER.fullmatch(key):
        return _within_layer(f"{MTP}{further[1]}.transformer_layer.", None, further[2])
    hit = _LAYER.fullmatch(key)
    if hit is None:
        return Spelled((key,))
    return _within_layer("decoder.layers.{layer}.", int(hit[1]), hit[2])


def _within_layer(place: str, layer: int | None, suffix: str) -> Spelled:
    if expert := _ONE_BY_ONE.fullmatch(suffix):
        return Spelled((f"{place}{_EXPERT}{{expert}}.{expert[2]}",), layer, int(expert[1]))
    if expert := _GROUPED.fullmatch(suffix):
        return Spelled((f"{place}{_EXPERT}{{expert}}.{expert[1]}",), layer, int(expert[2]))
    if former := _FORMER_GROUPED.fullmatch(suffix):
        return Spelled((f"{place}{_EXPERT}{{expert}}.linear_fc{former[1]}.weight",), layer, is_every_expert=True)
    if suffix.startswith("attention."):
        suffix = f"self_{suffix}"
    return Spelled(tuple(place + name for name in _SPELLINGS.get(suffix, (suffix,))), layer)
