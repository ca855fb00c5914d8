"""What Megatron's optimizers save beside their tensors: parameter groups, the step, the loss scale.

A model with experts of their own process groups has two optimizers, chained: one for the dense parameters, one for
the experts. Read from any of Megatron's forms and written in any other (megatron-core 0.19: core/optimizer/
optimizer.py, distrib_optimizer.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.parallel_layout import ParallelLayout

OptimizerKind = Literal["fully_reshardable", "plain", "distributed"]
"""torch_dist's distributed optimizer, either format's plain one, and legacy's distributed one with flat buffers."""

Group = dict[str, Any]
_KNOWN = {"optimizer", "grad_scaler", "param_state_sharding_type", "param_state", "fp32_from_fp16_params"}


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """Parameter groups without their parameters. `step` is an int as a fused Adam counts, a float as torch's does."""

    dense: tuple[Group, ...]
    experts: tuple[Group, ...] | None
    """None where one optimizer holds all."""
    step: int | float | None
    scaler: Any = None

    def split(self, *, experts_apart: bool, has_undecayed_experts: bool = False) -> OptimizerSettings:
        """The same settings for one optimizer, or for two.

        Megatron makes a group for what there is: experts have the decayed one, and that of biases where they have some.
        """
        if experts_apart == (self.experts is not None):
            return self
        wanted = (is_plain_group, is_undecayed_group) if has_undecayed_experts else (is_plain_group,)
        experts = tuple({**g, "is_expert_parallel": True} for g in self.dense if any(is_one(g) for is_one in wanted))
        return OptimizerSettings(
            dense=self.dense, experts=experts if experts_apart else None, step=self.step, scaler=self.scaler
        )

    @property
    def parts(self) -> tuple[tuple[Group, ...], ...]:
        """The groups of each chained optimizer."""
        return (self.dense,) if self.experts is None else (self.dense, self.experts)

    @property
    def per_parameter_step(self) -> bool:
        """torch's Adam counts for every parameter; fused ones count once a group."""
        return isinstance(self.step, float)


def is_plain_group(group: Group) -> bool:
    """The group of parameters without anything of their own: decayed, with the run's learning rate."""
    return wd_mult(group) == 1.0 and not is_decoupled(group)


def is_undecayed_group(group: Group) -> bool:
    """The group of norms and biases with the run's learning rate."""
    return wd_mult(group) == 0.0 and not is_decoupled(group)


def is_undecayed(name: str, shape: Sequence[int]) -> bool:
    """Whether Megatron's rule leaves a parameter undecayed: one with a single axis, or a bias of any shape."""
    return len(shape) == 1 or name.endswith(".bias")


def is_decoupled(group: Group) -> bool:
    """Whether a group has a learning rate of its own, as embedding and output layer may have."""
    return bool(group.get("is_decoupled_lr")) or group.get("default_config", True) is False


def wd_mult(group: Group) -> float:
    """The factor of a group's weight decay: 0 for norms and biases. NeMo puts `pre_` before the name."""
    value = group.get("wd_mult", group.get("pre_wd_mult", 1.0))
    return float(value) if isinstance(value, int | float) else 1.0


def experts_are_apart(layout: ParallelLayout, *, has_experts: bool, target_mcore: tuple[int, int] | None) -> bool:
    """Whether Megatron chains two optimizers; before 0.17 it did so under expert parallelism only."""
    if not has_experts:
        return False
    own_tp = layout.expert_tp != layout.tp and (target_mcore is None or target_mcore >= (0, 17))
    return layout.ep > 1 or own_tp


def optimizer_parts(saved: Any, where: str) -> list[dict[str, Any]]:
    """The state dict of each chained optimizer: torch_dist keys them by integers, legacy lists them.

    Raises BadInputError when it is neither.
    """
    found: list[Any] = [saved]
    if isinstance(saved, Mapping) and saved and all(isinstance(key, int) for key in cast(dict[Any, Any], saved)):
        found = [value for _, value in sorted(cast(dict[int, Any], saved).items())]
    elif isinstance(saved, list | tuple):
        found = list(cast(list[Any], saved))
    if not 1 <= len(found) <= 2 or not all(isinstance(part, Mapping) for part in found):
        raise BadInputError(
            f"{where}: `optimizer` holds {len(found)} values; expected one state dict, or two of chained optimizers "
            "(dense and experts)"
        )
    return [dict(part) for part in found]


def inner_state(part: Mapping[str, Any]) -> Mapping[str, Any]:
    """The torch optimizer's own state dict within one of Megatron's; in fp32 they are the same."""
    inner = part.get("optimizer", part.get("optimizer_state_dict", part))
    return cast(Mapping[str, Any], inner) if isinstance(inner, Mapping) else {}


def read_settings(saved: Any, where: str) -> OptimizerSettings:
    """The settings in what Megatron saved as `optimizer`. Raises BadInputError naming what is odd."""
    parts = optimizer_parts(saved, where)
    groups = [param_groups(part, f"{where}: optimizer {number}") for number, part in enumerate(parts)]
    steps = {step for part, held in zip(parts, groups, strict=True) for step in _steps(part, held)}
    if len(steps) > 1:
        raise NotSupportedError(f"{where}: the optimizer's parameters are at different steps {sorted(steps)[:4]}")
    for part in parts:
        if unknown := sorted(set(part) - _KNOWN - {"state", "param_groups"}):
            raise NotSupportedError(f"{where}: the optimizer holds {unknown}, which this version does not know")
    without = [tuple(_without(group, "params", "step") for group in held) for held in groups]
    return OptimizerSettings(
        dense=without[0],
        experts=without[1] if len(without) > 1 else None,
        step=next(iter(steps), None),
        scaler=next((part["grad_scaler"] for part in parts if part.get("grad_scaler")), None),
    )


def param_groups(part: Mapping[str, Any], where: str) -> list[Group]:
    """The parameter groups of one optimizer. Raises BadInputError when there are none."""
    groups: Any = inner_state(part).get("param_groups")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in cast(list[Any], groups)):
        raise BadInputError(f"{where}: param_groups is missing, or no list of dicts")
    return cast(list[Group], groups)


def _steps(part: Mapping[str, Any], groups: Sequence[Group]) -> set[int | float]:
    """The steps of a part: its groups', and those of its parameters (torch_dist keeps one for all: common_step)."""
    found: list[Any] = [group.get("step") for group in groups]
    state: Any = inner_state(part).get("state")
    if isinstance(state, Mapping):
        entries = cast(Mapping[Any, Any], state)
        found.append(entries.get("common_step"))
        found += [cast(Any, entry).get("step") for entry in entries.values() if isinstance(entry, Mapping)]
    steps: set[int | float] = set()
    for value in found:
        if isinstance(value, Tensor) and value.numel() == 1:
            steps.add(float(value.item()))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            steps.add(value)
    return steps


def _without(group: Group, *names: str) -> Group:
    return {key: value for key, value in group.items() if key not in names}


def distributed_part(groups: Sequence[Group], settings: OptimizerSettings) -> dict[str, Any]:
    """DistributedOptimizer.state_dict(): every group counts the step."""
    held = [group | ({} if settings.step is None else {"step": settings.step}) for group in groups]
    return {"optimizer": {"param_groups": held}} | _scaler(settings)


def plain_inner(groups: Sequence[Group], settings: OptimizerSettings) -> dict[str, Any]:
    """The torch optimizer's part of a plain one as torch_dist keeps it: one step for all parameters."""
    if settings.per_parameter_step:
        step = torch.tensor(settings.step, dtype=torch.float32)
        return {"state": {"common_step": step}, "param_groups": [dict(group) for group in groups]}
    counted = {} if settings.step is None else {"step": settings.step}
    return {"param_groups": [group | counted for group in groups]}


def plain_part(inner: dict[str, Any], settings: OptimizerSettings, *, mixed_precision: bool) -> dict[str, Any]:
    """Float16OptimizerWithFloat16Params' or, in fp32, FP32Optimizer's state dict around the torch optimizer's."""
    return {"optimizer": inner} | _scaler(settings) if mixed_precision else inner


def chained(parts: Sequence[dict[str, Any]], *, listed: bool) -> Any:
    """The state dicts of chained optimizers as one: legacy lists them, torch_dist keys them by integers."""
    if len(parts) == 1:
        return parts[0]
    return list(parts) if listed else dict(enumerate(parts))


def _scaler(settings: OptimizerSettings) -> dict[str, Any]:
    return {} if settings.scaler is None else {"grad_scaler": settings.scaler}
