"""Experts stacked in one tensor, as transformers 5 holds them in memory and some tools save them.

`...experts.gate_up_proj` [E, 2F, H] and `...experts.down_proj` [E, H, F] become one tensor an expert, named as the
family's published files name them. Rows of the stack are contiguous, so nothing is read or copied.

Shapes: E experts, F width of an expert, H hidden_size.
"""

from __future__ import annotations

import re

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.layout import GATED
from ckptbridge.converters.mapping import Family, Move
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.tensors import Checkpoint, LazyTensor, reshaped, rows

_FUSED = re.compile(r"model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.(gate_up_proj|down_proj)")

_BESIDE = ".block_sparse_moe."


def with_experts_apart(found: Checkpoint, family: Family, config: ModelConfig, where: str) -> dict[str, LazyTensor]:
    """The same tensors with every stack of experts taken apart; what is no stack stays as it is.

    Raises BadInputError, naming the tensor, when a stack has not the shape that the config asks for.
    """
    fused = {name: hit for name in found if (hit := _FUSED.fullmatch(name))}
    if not fused:
        return dict(found)
    moves = [move for move in family.moves(config) if move.expert is not None]
    if any(move.is_stacked for move in moves):  # the family's own form
        return dict(found)
    made = {name: tensor for name, tensor in found.items() if name not in fused}
    for name, hit in fused.items():
        is_gated = hit[2] == "gate_up_proj"
        mine = [m for m in moves if m.layer == int(hit[1]) and (m.layout is GATED) == is_gated]
        made.update(_taken_apart(name, found[name], mine, where))
    spelled = {other: name for name, _ in _beside_experts(family, config) for other in _in_memory(name)}
    return {spelled.get(name, name): tensor for name, tensor in made.items()}


def stack_shapes(family: Family, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every stack that a file may hold, by each name that it may have, and of a router named so."""
    shapes = {other: shape for name, shape in _beside_experts(family, config) for other in _in_memory(name)}
    for move in family.moves(config):
        layer = f"model.layers.{move.layer}"
        if move.expert is not None:
            stack = "gate_up_proj" if move.layout is GATED else "down_proj"
            for block in ("mlp", "block_sparse_moe"):
                shapes[f"{layer}.{block}.experts.{stack}"] = (config.num_moe_experts or 0, *move.shape)
    return shapes


def _taken_apart(name: str, stack: LazyTensor, moves: list[Move], where: str) -> dict[str, LazyTensor]:
    wanted = (len(moves), *moves[0].shape) if moves else ()
    if tuple(stack.shape) != wanted:
        raise BadInputError(f"{where}: tensor {name!r}: expected shape {list(wanted)}, found {list(stack.shape)}")
    height = moves[0].shape[0]
    flat = reshaped(stack, (len(moves) * height, *moves[0].shape[1:]))
    made: dict[str, LazyTensor] = {}
    for expert, move in enumerate(moves):
        at = expert * height
        for hf_name, shape in zip(move.hf, move.hf_shapes, strict=True):
            made[hf_name] = rows(flat, at, at + shape[0])
            at += shape[0]
    return made


def _beside_experts(family: Family, config: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
    """(published name, shape) of what stands beside the experts: the router and its bias."""
    return [(move.hf[0], move.shape) for move in family.moves(config) if _BESIDE in move.hf[0] and move.expert is None]


def _in_memory(published: str) -> tuple[str, ...]:
    """What transformers may call such a tensor in memory: `block_sparse_moe` is `mlp` there, `gate` may be `router`."""
    name = published.replace(_BESIDE, ".mlp.")
    return name, name.replace(".mlp.gate.", ".mlp.router.")
