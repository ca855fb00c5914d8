"""Legacy files' plain optimizer: a rank's parameters are numbered group by group, in the order of its modules.

Which parameters a group has follows from Megatron's rule: norms and biases are not decayed, and embedding and output
layer may have a learning rate of their own. Counts and shapes are compared with the model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.mcore.legacy.names import EMBEDDING, HEAD
from ckptbridge.converters.mcore.legacy.rank import FILE, LegacyRank
from ckptbridge.converters.mcore.legacy.reader import Held, LegacyFolder
from ckptbridge.converters.mcore.megatron_folder import OPTIMIZER_STATES
from ckptbridge.converters.mcore.optimizer.ranks import Chunk, RankFound, moment_name, parts_of_rank
from ckptbridge.converters.mcore.optimizer.settings import (
    Group,
    inner_state,
    is_decoupled,
    is_undecayed,
    param_groups,
    wd_mult,
)
from ckptbridge.converters.pickles import TensorRef
from ckptbridge.converters.tensors import LazyTensor, Stored

_MASTERS = ("fp32_from_fp16_params", "fp32_from_fp16")
_ENDS = (EMBEDDING, HEAD)


def find_plain(folder: LegacyFolder, rank: LegacyRank, chunks: Sequence[Chunk]) -> RankFound:
    """Every slice's states on one rank. Raises BadInputError naming index, expected and found."""
    found = RankFound()
    parts = parts_of_rank(rank)
    for number, part in enumerate(parts):
        where = f"{rank.path}: optimizer {number}" if len(parts) > 1 else f"{rank.path}: optimizer"
        state: Any = inner_state(part).get("state")
        masters: Any = next((part[name] for name in _MASTERS if name in part), None)
        groups = param_groups(part, where)
        members = _members([h for chunk in chunks for h in chunk.of_part(number, len(parts))], groups, folder, where)
        for at, (group, members_of) in enumerate(zip(groups, members, strict=True)):
            mains = iter(_masters_of(masters, at, where))
            for index, held in zip(_indices(group, where), members_of, strict=True):
                entry: Any = state.get(index) if isinstance(state, dict) else None  # pyright: ignore
                tensors = _moments(rank, held, entry, index, where)
                own = held.ref.storage.dtype == torch.float32
                if not own:
                    main: Any = next(mains, None)
                    tensors["param"] = _fitting(rank, main, held, f"{where}: main weight of index {index}")
                for name, tensor in tensors.items():
                    found.sources[moment_name(rank.name, name, held.chunk, held.key)] = tensor
                found.tensors[id(held)] = {"param": held.tensor()} | tensors
                step: Any = cast(dict[str, Any], entry).get("step")
                if isinstance(step, TensorRef):
                    found.sources[f"{rank.name}/{FILE}#{step.storage.key}"] = rank.tensor(step, f"{where}: step")
    return found


def _members(mine: list[Held], groups: list[Group], folder: LegacyFolder, where: str) -> list[list[Held]]:
    """The parameters of each group. Raises BadInputError when a group has another number of them."""
    decoupled = getattr(folder.args, "decoupled_lr", None) is not None
    decayed_norms = bool(getattr(folder.args, "apply_wd_to_qk_layernorm", False))
    members: list[list[Held]] = []
    for group in groups:
        wanted = (wd_mult(group) == 0.0, decoupled and is_decoupled(group))
        members.append(
            [h for h in mine if (_undecayed(h, decayed_norms), decoupled and h.move.name in _ENDS) == wanted]
        )
    for at, (group, held) in enumerate(zip(groups, members, strict=True)):
        indices = _indices(group, where)
        if len(indices) != len(held):
            names = ", ".join(h.key for h in held[:3])
            raise BadInputError(
                f"{where}: group {at} (wd_mult {wd_mult(group)}) has {len(indices)} parameters, the model has "
                f"{len(held)} such: {names} ..."
            )
    if len({id(h) for held in members for h in held}) != len(mine) or sum(map(len, members)) != len(mine):
        raise BadInputError(
            f"{where}: its {len(groups)} groups hold {sum(map(len, members))} of {len(mine)} parameters"
        )
    return members


def _undecayed(held: Held, decayed_norms: bool) -> bool:
    if decayed_norms and ("q_layernorm." in held.key or "k_layernorm." in held.key):
        return False
    return is_undecayed(held.key, held.ref.shape)


def _indices(group: Group, where: str) -> list[Any]:
    indices = group.get("params")
    if not isinstance(indices, list):
        raise BadInputError(f"{where}: a parameter group has no list of parameters")
    return cast(list[Any], indices)


def _masters_of(masters: Any, group: int, where: str) -> list[Any]:
    if masters is None:
        return []
    if not isinstance(masters, list) or group >= len(cast(list[Any], masters)) or not isinstance(masters[group], list):
        raise BadInputError(f"{where}: fp32_from_fp16_params has no list for group {group}")
    return cast(list[Any], masters[group])


def _moments(rank: LegacyRank, held: Held, entry: Any, index: Any, where: str) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    for state in OPTIMIZER_STATES[1:]:
        value: Any = cast(dict[str, Any], entry).get(state) if isinstance(entry, dict) else None
        tensors[state] = _fitting(rank, value, held, f"{where}: {state} of index {index}")
    return tensors


def _fitting(rank: LegacyRank, value: Any, held: Held, where: str) -> Stored:
    """A tensor of the weight's shape. Raises BadInputError naming its place, expected and found."""
    if not isinstance(value, TensorRef):
        raise BadInputError(f"{where} is missing: expected a tensor for {held.key}")
    if value.shape != held.ref.shape:
        raise BadInputError(f"{where}: expected shape {list(held.ref.shape)} of {held.key}, found {list(value.shape)}")
    return rank.tensor(value, where)
