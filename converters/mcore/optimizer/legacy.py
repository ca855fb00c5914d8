"""The optimizer in legacy files, plain or distributed: each rank's tensors found, and joined as their weights are.

Neither form has names: the order is that of the rank's modules. So beside counts and shapes the beginning of every
main weight is read: its rounding must be the weight itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, cast

import torch

from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.mapping import Family
from ckptbridge.converters.mcore.legacy.reader import Held, LegacyFolder, joined
from ckptbridge.converters.mcore.megatron_folder import OPTIMIZER_STATES
from ckptbridge.converters.mcore.optimizer.legacy_buffers import find_in_buffers
from ckptbridge.converters.mcore.optimizer.legacy_plain import find_plain
from ckptbridge.converters.mcore.optimizer.ranks import BUFFERS, chunks_by_rank, parts_of_rank
from ckptbridge.converters.mcore.optimizer.settings import (
    OptimizerKind,
    OptimizerSettings,
    inner_state,
    optimizer_parts,
    read_settings,
)
from ckptbridge.converters.mcore.optimizer.untrained import has_optimizer_state
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.pickles import TensorRef
from ckptbridge.converters.tensors import LazyTensor, Stored
from ckptbridge.converters.torch_archive import read_small_tensors

_Found = dict[int, dict[str, LazyTensor]]


def legacy_optimizer(folder: LegacyFolder) -> OptimizerKind | None:
    """The form of the optimizer's state; None where there is none. Raises NotSupportedError for a form not known."""
    if odd := sorted(path for rank in folder.ranks for path in rank.path.parent.glob("layer_wise_optimizer_*.pt")):
        raise NotSupportedError(f"{odd[0]}: the layer-wise distributed optimizer is not supported")
    if any((rank.path.parent / BUFFERS).exists() for rank in folder.ranks):
        return "distributed"
    saved = next((rank.tree["optimizer"] for rank in folder.ranks if rank.tree.get("optimizer")), None)
    if saved is None:
        return None
    if any(inner_state(part).get("state") for part in optimizer_parts(saved, str(folder.ranks[0].path))):
        return "plain"
    first = folder.ranks[0].path.parent / BUFFERS
    raise BadInputError(
        f"{first}: is missing, but {folder.ranks[0].path} has the settings of an optimizer; carry the weights alone "
        "with --no-optimizer"
    )


@dataclass(slots=True, kw_only=True)
class LegacyOptimizer:
    """A legacy checkpoint's optimizer: whole tensors by state and parameter, and all tensors as the files hold them."""

    settings: OptimizerSettings
    states: dict[str, dict[str, LazyTensor]] = field(default_factory=dict[str, dict[str, LazyTensor]])
    sources: dict[str, LazyTensor] = field(default_factory=dict[str, LazyTensor])


def open_legacy_optimizer(
    folder: LegacyFolder, family: Family, config: ModelConfig, kind: OptimizerKind, *, check_order: bool = True
) -> LegacyOptimizer:
    """Every state of every parameter that is trained.

    To check their order the first elements of main weights are read, no more. Raises BadInputError naming file, place,
    expected and found when something does not fit the model.
    """
    parameters = [held for held in folder.held(family, config) if has_optimizer_state(held.move.name)]
    find = find_plain if kind == "plain" else find_in_buffers
    made = LegacyOptimizer(settings=_settings(folder), states={state: {} for state in OPTIMIZER_STATES})
    found: _Found = {}
    for rank, chunks in chunks_by_rank(folder.ranks, parameters):
        here = find(folder, rank, chunks)
        found |= here.tensors
        made.sources |= here.sources
    for parameter in parameters:
        chosen = {id(copies[0]): _with_state(copies, found) for copies in parameter.slices}
        for held in chosen.values() if check_order else ():
            _check_main_weight(held, found[id(held)]["param"])
        for state in OPTIMIZER_STATES:
            made.states[state][parameter.move.name] = joined(parameter, _chosen(chosen, found, state))
    return made


def legacy_states_there(folder: LegacyFolder) -> tuple[str, ...]:
    """Which states of the optimizer are there: all or none; none of a form that cannot be read."""
    try:
        return OPTIMIZER_STATES if legacy_optimizer(folder) else ()
    except BadInputError:
        return ()


def legacy_states(folder: LegacyFolder, family: Family, config: ModelConfig, state: str) -> dict[str, LazyTensor]:
    """One state of every parameter: see MegatronFolder.parameters. Raises BadInputError where there is no optimizer."""
    kind = legacy_optimizer(folder)
    if kind is None:
        raise BadInputError(f"{folder.path}: holds no optimizer, so no {state}")
    return open_legacy_optimizer(folder, family, config, kind).states[state]


def _settings(folder: LegacyFolder) -> OptimizerSettings:
    """The settings in the first rank's file, with the step that torch's Adam counts for every parameter."""
    rank = folder.ranks[0]
    settings = read_settings(rank.tree.get("optimizer"), str(rank.path))
    read_small_tensors(settings.scaler, rank.path, rank.storages)
    if settings.step is not None:
        return settings
    for part in parts_of_rank(rank):
        state: Any = inner_state(part).get("state")
        for entry in state.values() if isinstance(state, dict) else ():  # pyright: ignore
            ref: Any = cast(dict[str, Any], entry).get("step") if isinstance(entry, dict) else None
            if isinstance(ref, TensorRef) and prod(ref.shape) == 1:
                return replace(settings, step=float(rank.tensor(ref, "the optimizer's step").read().item()))
    return settings


def _chosen(chosen: Mapping[int, Held], found: _Found, state: str) -> Callable[[Held], LazyTensor]:
    return lambda held: found[id(chosen[id(held)])][state]


def _with_state(copies: Sequence[Held], found: _Found) -> Held:
    """The copy whose file has the optimizer's part of it: data-parallel replicas do not."""
    for held in copies:
        if id(held) in found:
            return held
    first = copies[0]
    raise BadInputError(f"{first.rank.path.parent}: no rank's file holds the optimizer state of its {first.key}")


def _check_main_weight(held: Held, main: LazyTensor) -> None:
    """A weight is the rounding of its main weight: their first elements are compared."""
    weight, stored = held.tensor(), cast(Stored, main)
    if (stored.path, stored.offset) == (weight.path, weight.offset):
        return
    if not rounds_to(_first(stored), _first(weight)):
        raise BadInputError(
            f"{stored.path}: the fp32 main weight found for {held.key} does not round to the weight in {weight.path}: "
            "the order of the optimizer's tensors is not understood, or the files are of two steps. Carry the weights "
            "alone with --no-optimizer"
        )


def rounds_to(main: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether weights are the rounding of main weights; what is NaN in one has to be NaN in the other."""
    rounded = main.to(weight.dtype)
    return bool(((rounded == weight) | (rounded.isnan() & weight.isnan())).all())


def _first(stored: Stored) -> torch.Tensor:
    """Some 64 elements, read without the rest."""
    return Stored(stored.path, stored.offset, (min(64, prod(stored.shape)),), stored.dtype).read()
