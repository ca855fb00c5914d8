"""Dense -> mixture of experts, as a view: no tensor is read until the result is written, or loaded to be trained.

Shapes: N experts, G granularity, H hidden_size, F dense width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, cast

import torch
from torch import Tensor

from ckptbridge.converters.mcore.keys import layer_of
from ckptbridge.converters.model import Model
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.tensors import Checkpoint, LazyTensor, Zeros
from ckptbridge.converters.upcycling.branch_train_mix import averaged, check_number
from ckptbridge.converters.upcycling.changes import Changes
from ckptbridge.converters.upcycling.factors import Factors, expert_factors, shared_factors
from ckptbridge.converters.upcycling.measured import LayerMeasurement, Measured
from ckptbridge.converters.upcycling.mixtures import changed_mixture
from ckptbridge.converters.upcycling.neurons import DenseMlp, Expert, Neurons
from ckptbridge.converters.upcycling.partition import partition
from ckptbridge.converters.upcycling.routers import router_rows
from ckptbridge.converters.upcycling.semantics import check
from ckptbridge.converters.upcycling.spec import MIXTURE_METHODS, UpcycleSpec
from ckptbridge.converters.upcycling.targets import choose_target, hf_config_of

_MLP = ".mlp.linear_fc"


def upcycled(source: Model, spec: UpcycleSpec, measured: Measured | None = None, others: Sequence[Model] = ()) -> Model:
    """The source as a mixture of experts, or a mixture as another one; nothing is read yet.

    `measured` holds what a text showed of each layer, for methods that need it; `others` are the further models of
    branch-train-mix. Raises BadInputError for numbers that do not fit, models that are not alike or a measurement that
    is missing, NotSupportedError for a target that cannot express the model.
    """
    spec = spec.resolved()
    check(spec, source.config)
    check_number(spec, 1 + len(others))
    models = (source, *others)
    if others:
        source = averaged(models)
    derivation = f"{source.derivation} {spec!r}{_digest(measured or {})}".lstrip()
    if spec.method in MIXTURE_METHODS:
        return changed_mixture(source, spec, measured or {}, derivation)
    family, config, notes = choose_target(source, spec)
    return replace(
        source,
        family=family,
        config=config,
        tensors=_tensors(source, models, config, spec, measured or {}),
        hf_config=hf_config_of(source, family, config),
        hf_config_file=None,
        notes=(*source.notes, *notes),
        derivation=derivation,
        made_of=source.opened,
        saved=None,
    )


def _digest(measured: Measured) -> str:
    """Names the measurement, so that a conversion is not resumed with another one."""
    digest = hashlib.sha256()
    for layer in sorted(measured):
        for field in fields(LayerMeasurement):
            value: Any = getattr(measured[layer], field.name)
            for part in cast(tuple[Any, ...], value) if isinstance(value, tuple) else (value,):
                digest.update(part.numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode())
    return f" measured {digest.hexdigest()[:16]}" if measured else ""


def _tensors(
    source: Model, models: Sequence[Model], new: ModelConfig, spec: UpcycleSpec, measured: Measured
) -> dict[str, LazyTensor]:
    """The experts are cut from the models in turn, group by group; all else is the source's."""
    old, made = source.config, dict[str, LazyTensor]()
    for name, tensor in source.tensors.items():
        layer = layer_of(name)
        if layer is None or _MLP not in name or not new.is_moe_layer(layer):
            made[name] = tensor
            continue
        head, _, tail = name.partition(".mlp.")
        if tail.startswith("linear_fc1.layer_norm_"):
            made[f"{head}.pre_mlp_layernorm.{tail.removeprefix('linear_fc1.layer_norm_')}"] = tensor
        elif tail == "linear_fc1.weight":
            mlp, *parts = (_mlp(model.tensors, head, layer, old) for model in (source, *models))
            made |= _mixture(head, mlp, parts, old, new, spec, measured.get(layer))
    return made


def _mlp(held: Checkpoint, head: str, layer: int, config: ModelConfig) -> DenseMlp:
    fc1, fc2 = (held[f"{head}.mlp.linear_fc{number}.weight"] for number in (1, 2))
    return DenseMlp(layer, fc1, fc2, config.ffn_hidden_size, config.gated_linear_unit)


def _mixture(
    head: str,
    mlp: DenseMlp,
    parts: Sequence[DenseMlp],
    old: ModelConfig,
    new: ModelConfig,
    spec: UpcycleSpec,
    measured: LayerMeasurement | None,
) -> Mapping[str, LazyTensor]:
    cut = partition(spec, mlp.layer, mlp.width, measured)
    factors = expert_factors(spec, old, 1.0 if measured is None else measured.scale)
    made: dict[str, LazyTensor] = {
        f"{head}.mlp.router.weight": router_rows(spec, new, mlp.layer, mlp.fc1.dtype, measured)
    }
    if new.moe_router_enable_expert_bias:
        made[f"{head}.mlp.router.expert_bias"] = Zeros((spec.num_experts,), torch.float32)
    # Groups that are cut alike share their shards: bytes that stand in several experts are read and made once.
    shards: dict[tuple[int, int], list[Expert]] = {}
    changes = [Changes(spec, part, factors) for part in parts]
    for number in range(spec.num_experts):
        group, shard = divmod(number, spec.granularity)
        neurons, part = cut.groups[group], group % len(parts)
        if (id(neurons), part) not in shards:
            shards[id(neurons), part] = [parts[part].expert(own, factors) for own in neurons]
        expert = changes[part].of(shards[id(neurons), part][shard], number, neurons[shard])
        made |= _named(f"{head}.mlp.experts.experts.{number}", expert)
    if new.moe_shared_expert_intermediate_size:
        made |= _named(f"{head}.mlp.shared_experts", _shared(mlp, new, spec, cut.shared))
        if new.moe_shared_expert_gate:
            made[f"{head}.mlp.shared_experts.gate_weight"] = Zeros((1, new.hidden_size), mlp.fc1.dtype)
    return made


def _shared(mlp: DenseMlp, new: ModelConfig, spec: UpcycleSpec, neurons: Neurons | None) -> Expert:
    """The shared expert; where the class wants one that the spec does not ask for, one that adds nothing."""
    if neurons is not None:
        return mlp.expert(neurons, shared_factors(spec, is_gated=new.moe_shared_expert_gate))
    width = new.moe_shared_expert_intermediate_size or 0
    unused = mlp.expert(range(width), Factors())
    return Expert(unused.fc1, Zeros((new.hidden_size, width), mlp.fc2.dtype))


def _named(stem: str, expert: Expert) -> dict[str, LazyTensor]:
    return {f"{stem}.linear_fc1.weight": expert.fc1, f"{stem}.linear_fc2.weight": expert.fc2}
