"""What the ranks of a run of megatron-core hold, told in terms of the whole model.

Where a rank's tensor belongs is megatron-core's own description of its shards; nothing here knows how ckptbridge lays
anything out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

Snapshot = dict[str, dict[str, Tensor]]
"""State ("" is the weight, else param, exp_avg, exp_avg_sq) -> megatron-core's key -> the whole tensor."""


def snapshot(model: GPTModel, optimizers: Sequence[Any]) -> Snapshot:
    """Every weight and optimizer tensor of the whole model, the same on every rank."""
    parts: list[tuple[str, str, tuple[int, ...], tuple[int, ...], Tensor]] = []
    shards, _ = extract_sharded_tensors_and_factories({"model": model.sharded_state_dict()})
    by_parameter = {id(shard.data): shard for shard in nested_values(shards)}
    for optimizer in optimizers:
        for parameter, states in _states_of(optimizer):
            base = by_parameter[id(parameter)]
            for state, tensor in states.items():
                changed: Any = {"data": tensor}
                if isinstance(base, ShardedTensor):
                    changed["dtype"] = tensor.dtype
                made = {"": dataclasses.replace(base, **changed)}
                apply_factories(made)
                for part in nested_values(made):
                    data = part.data.detach().reshape(part.local_shape[-part.data.ndim :]).clone()
                    parts.append((state, part.key, part.global_shape, part.global_offset, data))
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, parts)
    return _assembled(everywhere)


def _assembled(everywhere: list[Any]) -> Snapshot:
    """Whole tensors. Where replicas do not hold the same, there is NaN, which equals nothing."""
    whole: Snapshot = {}
    seen: dict[tuple[Any, ...], Tensor] = {}
    for state, key, shape, offset, data in (part for parts in everywhere for part in parts):
        known = seen.setdefault((state, key, offset), data)
        tensor = whole.setdefault(state, {}).setdefault(key, torch.full(shape, float("nan"), dtype=data.dtype))
        missing = len(shape) - data.ndim
        place = (*offset[:missing], *(slice(o, o + n) for o, n in zip(offset[missing:], data.shape, strict=True)))
        tensor[place] = data if torch.equal(known, data) else float("nan")
    return whole


def _states_of(optimizer: Any) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """(parameter, its weight and states in the parameter's own shape), gathered over data-parallel ranks."""
    if isinstance(optimizer, DistributedOptimizer):
        return _distributed_states(optimizer)
    pairs: list[tuple[Tensor, Tensor]] = []
    if hasattr(optimizer, "float16_groups"):
        for group, mains in zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True):
            pairs += zip(group, mains, strict=True)
        pairs += [(p, p) for group in optimizer.fp32_from_fp32_groups for p in group]
    else:
        pairs = [(p, p) for group in optimizer.optimizer.param_groups for p in group["params"]]
    inner = optimizer.optimizer.state
    return [
        (
            parameter,
            {"": parameter, "param": main} | {k: inner[main][k] for k in ("exp_avg", "exp_avg_sq")},
        )
        for parameter, main in pairs
    ]


def _distributed_states(optimizer: DistributedOptimizer) -> list[tuple[Tensor, dict[str, Tensor]]]:
    group = optimizer.data_parallel_group
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    order = [p for buffer in optimizer.buffers for p in buffer.params]
    mine: list[Any] = []
    for number, parameter in enumerate(order):
        if parameter not in optimizer.model_param_gbuf_map:
            continue
        part = optimizer._get_model_param_range_map(parameter)["param"]
        tensors = optimizer._get_main_param_and_optimizer_states(parameter)
        states = {k: tensors[k].detach().clone() for k in ("param", "exp_avg", "exp_avg_sq")}
        mine.append((number, part.start, part.end, states))
    everywhere: list[Any] = [None] * group.size()
    dist.all_gather_object(everywhere, mine, group=group)
    whole = [{k: torch.full((p.numel(),), float("nan")) for k in ("param", "exp_avg", "exp_avg_sq")} for p in order]
    for number, start, end, states in (part for parts in everywhere for part in parts):
        for state, tensor in states.items():
            whole[number][state][start:end] = tensor
    for parameter, states in zip(order, whole, strict=True):
        found.append((parameter, {"": parameter} | {k: t.reshape(parameter.shape) for k, t in states.items()}))
    return found
