"""What every Megatron format offers: a folder that is read, a writer that plans one. Neither touches a tensor's bytes.

`state` says which tensor of a parameter is meant: "" is the weight of the model, "param", "exp_avg" and "exp_avg_sq"
are the optimizer's fp32 main weight and Adam's two moments, in megatron-core's words.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ckptbridge.converters.mapping import Family
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.output import OutputFile
from ckptbridge.converters.tensors import Checkpoint, LazyTensor

OPTIMIZER_STATES = ("param", "exp_avg", "exp_avg_sq")


class MegatronFolder(Protocol):
    """One iteration's folder, opened: nothing but headers is read."""

    @property
    def path(self) -> Path: ...

    @property
    def common(self) -> Mapping[str, Any]:
        """What was saved beside the tensors: args, iteration, the scheduler."""
        ...

    @property
    def args(self) -> Namespace | None:
        """The run's arguments, if the checkpoint holds them."""
        ...

    def states(self) -> tuple[str, ...]:
        """Which of OPTIMIZER_STATES are there, in that order."""
        ...

    def parameters(self, family: Family, config: ModelConfig, state: str = "") -> dict[str, LazyTensor]:
        """One state of every parameter, unsplit, by name with layer and expert numbers, vocabulary without padding.

        Of the optimizer's states, those of parameters that Megatron trains: an expert_bias has none.
        Raises BadInputError that lists everything missing and unexpected and every shape that the config contradicts.
        """
        ...

    def sources(self) -> Checkpoint:
        """The weights as the files hold them, by a name that is unique in the folder: for digests."""
        ...


@dataclass(slots=True, kw_only=True)
class MegatronPlan:
    """Everything that a folder will hold. `files` carry tensors, `last` are small files in the order of writing."""

    files: list[OutputFile]
    last: list[tuple[str, bytes]]


class MegatronWriter(Protocol):
    """Collects parameters and lays them out for one parallel layout."""

    def add_model(self, tensors: Checkpoint, state: str = "") -> None:
        """One state of every parameter, unsplit, by name with layer and expert numbers."""
        ...

    def args(self) -> Namespace:
        """The arguments that describe this model and layout."""
        ...

    def plan(
        self,
        common: Mapping[str, Any],
        *,
        args: Namespace | None = None,
        iteration: int = 0,
        content_metadata: Mapping[str, Any] | None = None,
    ) -> MegatronPlan:
        """The files of everything that was added, with `common` beside the args and Megatron's own items."""
        ...
