"""One update of the weights: forward and backward over all micro-batches, clipping, Adam; eagerly or as a CUDA graph.

Shapes: B sequences a step, S sequence length, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.profiler import record_function

from ckptbridge.converters.errors import BadInputError
from ckptbridge.trainer.decoder import Decoder
from ckptbridge.trainer.expert_bias import check_biases_can_move, move_expert_biases
from ckptbridge.trainer.optimizer import Optimizer
from ckptbridge.trainer.profile_parts import RANGE
from ckptbridge.trainer.readings import Readings
from ckptbridge.trainer.step import accumulate_gradients
from ckptbridge.trainer.step_graph import EAGER_CALLS, StepGraph

Graph = Literal["auto", "on", "off"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReading:
    """What one step said, read from the device at once."""

    loss: float
    grad_norm: float
    aux_loss: float | None
    z_loss: float | None
    expert_load: dict[int, list[float]]
    """By layer: the fraction of the choices that fell on each expert."""


class Update:
    """Takes step after step. The batch and the learning rate lie in memory of the device that stays where it is."""

    def __init__(
        self,
        decoder: Decoder,
        optimizer: Optimizer,
        *,
        micro_batch_size: int,
        aux_loss_coeff: float,
        z_loss_coeff: float = 0.0,
        bias_update_rate: float = 0.0,
        graph: Graph,
        never: str | None = None,
    ) -> None:
        """`never` says why no step of this run can be captured, as a clause, where that is known from the start.

        `bias_update_rate` is how far expert biases move after each step. Raises BadInputError if a graph is asked for
        where there can be none, or a rate where there are no biases.
        """
        check_biases_can_move(decoder, bias_update_rate)
        self.decoder, self.optimizer = decoder, optimizer
        self.micro_batch_size, self.aux_loss_coeff = micro_batch_size, aux_loss_coeff
        self.z_loss_coeff, self.bias_update_rate = z_loss_coeff, bias_update_rate
        weight = decoder.output_weight_VH
        self.device = weight.device
        self._lr = torch.zeros((), dtype=torch.float64, device=self.device)
        self._batch_BS: Tensor | None = None
        self._must, self._graph = graph == "on", None
        if self._must and self.device.type != "cuda":
            raise BadInputError("kernels.graph: a CUDA graph was asked for, but the run is on a CPU; use auto or off")
        if self._must and never is not None:
            raise BadInputError(f"kernels.graph: on was asked for, but {never}; use auto, which runs without a graph")
        is_fit = self.device.type == "cuda" and weight.dtype == torch.bfloat16
        if self._must or (graph == "auto" and is_fit and never is None):
            self._graph = StepGraph(self._step, self.device, forget=optimizer.forget_gradients)
        why_not = never if is_fit else "only a bf16 run on a GPU is captured"
        self._off = f"kernels.graph is {graph}" if graph == "off" else f"auto: {why_not}"

    def take(self, batch_BS: Tensor, lr: float, *, is_profiled: bool = False) -> StepReading:
        """Update the weights by the gradients of a batch [B, S + 1] of token ids.

        A profiled step is launched operation by operation: a profiler cannot tell apart what a graph replays.
        """
        self.start(batch_BS, lr, is_profiled=is_profiled)
        return self.finish()

    def start(self, batch_BS: Tensor, lr: float, *, is_profiled: bool = False) -> None:
        """Hand the step to the device, which works on it after this returns."""
        if self._batch_BS is None:
            self._batch_BS = torch.empty_like(batch_BS, device=self.device)
        if self.device.type == "cuda" and not batch_BS.is_cuda:
            batch_BS = batch_BS.pin_memory()
        self._batch_BS.copy_(batch_BS, non_blocking=True)
        self._lr.fill_(lr)
        if self._graph is None:
            self._readings = self._step()
        else:
            self._readings = self._graph.eager() if is_profiled else self._graph()
        if self._must and self._graph is not None and self._graph.obstacle:
            raise BadInputError(
                f"kernels.graph: on was asked for, but {self._graph.obstacle}; use auto, which goes on without a graph"
            )

    def finish(self) -> StepReading:
        """Wait for the step and read what it said."""
        read = self._readings.read()
        load = {int(name.removeprefix("load ")): read[name] for name in read if name.startswith("load ")}
        return StepReading(
            loss=read["loss"],
            grad_norm=read["grad_norm"],
            aux_loss=read.get("aux_loss"),
            z_loss=read.get("z_loss"),
            expert_load=load,
        )

    @property
    def graph_sentence(self) -> str | None:
        """Whether steps are replayed, and if not why; None until the run knows."""
        if self._graph is None:
            return f"Steps are launched operation by operation ({self._off})."
        if self._graph.obstacle is not None:
            return f"Steps are launched operation by operation ({self._graph.obstacle})."
        if self._graph.is_captured:
            return f"Steps are replayed as one CUDA graph, captured after {EAGER_CALLS} steps."
        return None

    def _step(self) -> Readings:
        if self._batch_BS is None:
            raise ValueError("no batch has been handed over yet")
        result = accumulate_gradients(
            self.decoder, self._batch_BS, self.micro_batch_size, self.aux_loss_coeff, self.z_loss_coeff
        )
        with record_function(RANGE + "optimizer"):
            grad_norm = self.optimizer.step_on_device(self._lr)
            if self.bias_update_rate:
                move_expert_biases(self.decoder, result.choices, self.bias_update_rate)
        tensors = {"loss": result.loss, "grad_norm": grad_norm}
        optional = {"aux_loss": result.aux_loss, "z_loss": result.z_loss}
        tensors |= {name: value for name, value in optional.items() if value is not None}
        return Readings.of(tensors | {f"load {layer}": load_E for layer, load_E in result.expert_load.items()})
