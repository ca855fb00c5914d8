"""The optimizer's state of an opened Megatron checkpoint of any format: whole tensors, named as their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.mcore.legacy.reader import LegacyFolder
from ckptbridge.converters.mcore.optimizer.legacy import legacy_optimizer, open_legacy_optimizer, rounds_to
from ckptbridge.converters.mcore.optimizer.settings import OptimizerKind, OptimizerSettings, read_settings
from ckptbridge.converters.mcore.optimizer.torch_dist import torch_dist_optimizer
from ckptbridge.converters.mcore.optimizer.untrained import has_optimizer_state
from ckptbridge.converters.mcore.torch_dist_reader import TorchDistFolder
from ckptbridge.converters.model import Model
from ckptbridge.converters.tensors import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """An optimizer's state out of a checkpoint: whole tensors by state and parameter, and what stands beside them."""

    kind: OptimizerKind
    states: Mapping[str, Checkpoint]
    settings: OptimizerSettings | None
    """None where the checkpoint is of a trainer that keeps its own."""
    sources: Checkpoint
    """The same tensors as the files hold them, for digests."""


def open_optimizer(source: Model) -> Optimizer | None:
    """The optimizer's state in a Megatron checkpoint; None where there is none.

    Of the tensors, the first rows of main weights are read. Raises NotSupportedError for a form that cannot be
    carried, BadInputError when the tensors do not fit the model.
    """
    folder = source.saved
    if isinstance(folder, LegacyFolder):
        kind = legacy_optimizer(folder)
        if kind is None:
            return None
        legacy = open_legacy_optimizer(folder, source.family, source.config, kind)
        return Optimizer(kind=kind, states=legacy.states, settings=legacy.settings, sources=legacy.sources)
    if not isinstance(folder, TorchDistFolder):
        if folder is not None and folder.states():
            raise NotSupportedError(
                f"{folder.path}: the optimizer of a {source.format} checkpoint cannot be carried; carry the weights "
                "alone with --no-optimizer"
            )
        return None
    if (kind := torch_dist_optimizer(folder)) is None:
        return None
    saved = folder.common.get("optimizer")
    held = Optimizer(
        kind=kind,
        states={state: folder.parameters(source.family, source.config, state) for state in folder.states()},
        settings=read_settings(saved, str(folder.path)) if saved else None,
        sources=folder.optimizer_sources(),
    )
    _check_main_weights(source, held)
    return held


def main_weights(source: Model, held: Optimizer) -> Checkpoint:
    """The fp32 main weights; an fp32 run has no others than its weights."""
    mains = held.states.get("param")
    if mains is not None:
        return mains
    if any(tensor.dtype != torch.float32 for tensor in source.tensors.values()):
        raise BadInputError(f"{source.path}: holds Adam's moments, but no fp32 main weights beside {source.dtype} ones")
    return {name: tensor for name, tensor in source.tensors.items() if has_optimizer_state(name)}


def every_tensor(model: Model) -> Checkpoint:
    """Every tensor in a Megatron checkpoint's files, replicas and the optimizer's included, named as receipts do."""
    folder = model.saved
    if isinstance(folder, TorchDistFolder):
        return {**model.sources, **folder.optimizer_sources()}
    if not isinstance(folder, LegacyFolder):
        return model.sources
    weights = {
        rank.label(number, key): rank.tensor(chunk[key], key)
        for rank in folder.ranks
        for number, chunk in enumerate(rank.chunks)
        for key in rank.spelled[number]
    } | dict(model.beside)
    if not folder.states() or (kind := legacy_optimizer(folder)) is None:
        return weights
    return weights | open_legacy_optimizer(folder, model.family, model.config, kind, check_order=False).sources


def _check_main_weights(source: Model, held: Optimizer) -> None:
    """A weight is the rounding of its main weight: the first rows are compared, of a layer's experts the first's.

    megatron-core up to 0.19.2 itself saves main weights and moments that are shifted against their names when a
    run's flat buffers have several buckets whose padding is not empty (the remark on issue 504 in
    distrib_optimizer.py, sharded_param_state_fully_reshardable): they must not be carried as if they were sound.
    """
    mains = held.states.get("param", {})
    wrong: list[str] = []
    for move in source.family.moves(source.config):
        if move.expert or (main := mains.get(move.name)) is None:
            continue
        weight = source.tensors[move.name]
        if not rounds_to(main.read_rows(0, 1), weight.read_rows(0, 1)):
            wrong.append(move.name)
    if wrong:
        raise BadInputError(
            f"{source.path}: the optimizer's main weights of {len(wrong)} parameters do not round to the weights, "
            f"{wrong[0]} first: megatron-core saves them shifted when gradients are reduced in several buckets with "
            "padding, and Adam's moments with them. Save the run without --overlap-grad-reduce, or carry the weights "
            "alone with --no-optimizer"
        )
