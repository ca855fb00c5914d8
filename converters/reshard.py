"""A Megatron checkpoint for another layout, in another format, with other names; the optimizer goes with its weights.

The fp32 main weights and Adam's moments are whole tensors here, named as their weights: so each is cut, joined and
padded exactly as its weight is. What stands beside the tensors is carried as far as it fits the new layout.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from ckptbridge.converters.convert import (
    ConversionPlan,
    ConvertOptions,
    WrittenFormat,
    cast_all,
    checked_target,
    megatron_conversion,
    megatron_writer,
)
from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.mapping import check_names_and_shapes
from ckptbridge.converters.mcore.carried import (
    carried_args,
    carried_items,
    carry_objects,
    note_random_states,
)
from ckptbridge.converters.mcore.legacy.reader import LegacyFolder
from ckptbridge.converters.mcore.legacy.writer import LegacyWriter
from ckptbridge.converters.mcore.megatron_folder import MegatronFolder
from ckptbridge.converters.mcore.notes import megatron_notes
from ckptbridge.converters.mcore.optimizer.buffers import bucket_size
from ckptbridge.converters.mcore.optimizer.legacy_writer import OptimizerBeside
from ckptbridge.converters.mcore.optimizer.settings import (
    OptimizerKind,
    OptimizerSettings,
    experts_are_apart,
    is_undecayed,
)
from ckptbridge.converters.mcore.optimizer.state import Optimizer, main_weights, open_optimizer
from ckptbridge.converters.mcore.optimizer.torch_dist import SHARDING, common_optimizer
from ckptbridge.converters.mcore.torch_dist_reader import TorchDistFolder
from ckptbridge.converters.mcore.torch_dist_writer import TorchDistWriter
from ckptbridge.converters.model import Model
from ckptbridge.converters.tensors import Checkpoint

OptimizerFormat = Literal["keep", "none", "fully_reshardable", "plain", "distributed"]
_LAYOUT_METADATA = ("non_homogeneous_layers", "singleton_local_shards", "dp_cp_group")
_KINDS: dict[WrittenFormat, dict[OptimizerKind, OptimizerKind]] = {
    "torch_dist": {"fully_reshardable": "fully_reshardable", "distributed": "fully_reshardable", "plain": "plain"},
    "torch": {"fully_reshardable": "distributed", "distributed": "distributed", "plain": "plain"},
}
"""What an optimizer becomes in a format: distributed stays distributed."""


def plan_reshard(
    source: Model,
    target: Path,
    to: WrittenFormat,
    options: ConvertOptions | None = None,
    *,
    optimizer: OptimizerFormat = "keep",
    data_parallel_size: int = 1,
) -> ConversionPlan:
    """Everything that a Megatron checkpoint in another layout or format will hold, from headers alone.

    `optimizer` of "keep" gives the form that the source's has in the target's format, "none" drops it.
    `data_parallel_size` is that of the run which will load it: flat buffers follow from it.
    Raises BadInputError or NotSupportedError when something cannot be carried so; nothing has been written then.
    """
    try:
        return _plan(source, target, to, options or ConvertOptions(), optimizer, data_parallel_size)
    except BadInputError as error:
        if str(source.path) in str(error):
            raise
        raise type(error)(f"{source.path}: {error}") from error
    except RecursionError as error:
        raise BadInputError(f"{source.path}: its common state is nested too deep to be written again") from error


def _plan(
    source: Model,
    target: Path,
    to: WrittenFormat,
    options: ConvertOptions,
    optimizer: OptimizerFormat,
    data_parallel_size: int,
) -> ConversionPlan:
    target = checked_target(target, options)
    folder = source.saved
    if folder is None:
        raise BadInputError(f"{source.path}: is a Hugging Face checkpoint; use hf2mcore")
    if data_parallel_size < 1:
        raise BadInputError(f"data_parallel_size is {data_parallel_size}: it must be at least 1")
    expected = {move.name: move.shape for move in source.family.moves(source.config)}
    check_names_and_shapes(expected, source.tensors, str(source.path))
    held = None if optimizer == "none" else open_optimizer(source)
    kind = _target_kind(source, held, to, optimizer)
    if options.for_bridge and kind is not None:
        raise NotSupportedError("--for-bridge gives Megatron-Bridge weights alone; drop the optimizer: --no-optimizer")
    writer = megatron_writer(source, to, options)
    weights = _weights(source, held, options.dtype)
    writer.add_model(weights)
    kept = carried_items(folder.common)
    metadata: dict[str, Any] = {}
    if isinstance(writer, TorchDistWriter):
        if isinstance(folder, TorchDistFolder):
            carry_objects(kept, folder, options.layout)
            for key in kept.objects:
                writer.add_object(key, folder.read_object(key))
        if held is not None and kind is not None:
            _add_to_torch_dist(writer, source, held, kind, weights, options, kept.common)
        metadata = _content_metadata(folder, kind)
    note_random_states(kept, _has_random_states(folder), legacy=to == "torch")
    args, args_notes = carried_args(
        folder.args,
        writer.args(),
        layout=options.layout,
        iteration=source.iteration,
        optimizer=kind,
        random_states=kept.random_states,
        data_parallel_size=data_parallel_size,
        new_dtype=options.dtype is not None,
    )
    if isinstance(writer, LegacyWriter) and held is not None and held.settings is not None and kind is not None:
        for state, tensors in {**held.states, "param": main_weights(source, held)}.items():
            writer.add_model(tensors, state)
        settings = _for_layout(held.settings, source, options)
        writer.beside = OptimizerBeside(
            kind=kind,
            settings=settings,
            args=args,
            data_parallel_size=data_parallel_size,
            moves={move.name: move for move in source.family.moves(source.config)},
        )
    plan = writer.plan(
        {"ckptbridge": _own_item(folder, source), **kept.common},
        args=args,
        iteration=source.iteration,
        content_metadata=metadata,
    )
    trained = source.iteration > 0 or held is not None
    told = [*kept.notes, *args_notes, *_optimizer_notes(source, held)]
    if kind == "distributed" and bucket_size(args, numel=0, data_parallel_size=data_parallel_size) is not None:
        told.append(_bucket_note(args, data_parallel_size))
    notes = (*source.notes, *megatron_notes(source.config), *told)
    return megatron_conversion(
        replace(source, sources={**source.sources, **(held.sources if held else {})}),
        target,
        to,
        options,
        plan,
        iteration=source.iteration if trained else None,
        notes=notes,
    )


def _target_kind(
    source: Model, held: Optimizer | None, to: WrittenFormat, asked: OptimizerFormat
) -> OptimizerKind | None:
    if asked == "none" or (held is None and asked == "keep"):
        return None
    if held is None:
        raise BadInputError(f"{source.path}: holds no optimizer state that could be carried as {asked}")
    kind = _KINDS[to][held.kind] if asked == "keep" else asked
    if kind not in _KINDS[to].values():
        fits = ", ".join(sorted(set(_KINDS[to].values())))
        raise BadInputError(f"--optimizer-format {asked}: the format {to} holds an optimizer as {fits}")
    if held.settings is None and (kind != held.kind):
        raise NotSupportedError(
            f"{source.path}: was saved by a trainer that keeps no param_groups of Megatron's, so its optimizer can be "
            f"carried as {held.kind} only; carry the weights alone with --no-optimizer"
        )
    return kind


def _weights(source: Model, held: Optimizer | None, dtype: torch.dtype | None) -> Checkpoint:
    """The weights in the dtype that is asked for; in fp32 they are the optimizer's main weights, where it has them."""
    mains = held.states.get("param") if held is not None else None
    if dtype == torch.float32 and mains is not None:
        return {**cast_all(source.tensors, dtype), **mains}
    return cast_all(source.tensors, dtype)


def _add_to_torch_dist(
    writer: TorchDistWriter,
    source: Model,
    held: Optimizer,
    kind: OptimizerKind,
    weights: Checkpoint,
    options: ConvertOptions,
    common: dict[str, Any],
) -> None:
    half = any(weight.dtype != torch.float32 for weight in weights.values())
    mains = main_weights(source, held)
    if kind == "fully_reshardable":
        writer.add_model(mains, "param")
    elif half:
        writer.add_model({n: m for n, m in mains.items() if weights[n].dtype != torch.float32}, "fp32_param")
    for state in ("exp_avg", "exp_avg_sq"):
        if state in held.states:
            writer.add_model(held.states[state], state)
    if held.settings is not None:
        settings = _for_layout(held.settings, source, options)
        common["optimizer"] = common_optimizer(settings, kind, mixed_precision=half)


def _for_layout(settings: OptimizerSettings, source: Model, options: ConvertOptions) -> OptimizerSettings:
    has_experts = source.config.num_moe_experts is not None
    apart = experts_are_apart(options.layout, has_experts=has_experts, target_mcore=options.target_mcore)
    experts = (move for move in source.family.moves(source.config) if move.expert is not None)
    return settings.split(
        experts_apart=apart, has_undecayed_experts=any(is_undecayed(m.name, m.shape) for m in experts)
    )


def _bucket_note(args: Namespace, data_parallel_size: int) -> str:
    """The args ask for gradients that are reduced in buckets: what they follow from must be the same in the run."""
    told = {name: getattr(args, name, None) for name in ("ddp_num_buckets", "ddp_bucket_size")}
    given = ", ".join(f"{name} {value}" for name, value in told.items() if value)
    return (
        "flat buffers are laid out in buckets, for the args' overlap_grad_reduce with "
        f"{given or f'data-parallel size {data_parallel_size} (--data-parallel-size)'}: load them with the same"
    )


def _content_metadata(folder: MegatronFolder, kind: OptimizerKind | None) -> dict[str, Any]:
    saved: Any = folder.common.get("content_metadata")
    told: dict[str, Any] = dict(saved) if isinstance(saved, dict) else {}  # pyright: ignore[reportUnknownArgumentType]
    metadata = {k: v for k, v in told.items() if k not in _LAYOUT_METADATA and not k.startswith("distrib_optim")}
    if kind == "fully_reshardable":
        metadata |= {k: v for k, v in told.items() if k.startswith("distrib_optim")} | {SHARDING: kind}
    return metadata


def _has_random_states(folder: MegatronFolder) -> bool:
    if isinstance(folder, LegacyFolder):
        return "rng_state" in folder.ranks[0].tree
    return isinstance(folder, TorchDistFolder) and any(key.startswith("rng_state/") for key in folder.objects)


def _own_item(folder: MegatronFolder, source: Model) -> dict[str, Any]:
    saved: Any = folder.common.get("ckptbridge")
    own: dict[str, Any] = dict(saved) if isinstance(saved, dict) else {}  # pyright: ignore[reportUnknownArgumentType]
    return {**own, "family": source.family.name}


def _optimizer_notes(source: Model, held: Optimizer | None) -> list[str]:
    if held is not None or source.saved is None or not source.iteration:
        return []
    return [
        f"iteration {source.iteration} without optimizer state: Megatron-LM loads it with --finetune or --no-load-optim"
    ]
