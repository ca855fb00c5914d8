"""A dense MLP cut into experts by neurons: rows of gate_proj and up_proj, columns of down_proj; nothing is read.

Shapes: F dense width, H hidden_size.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ckptbridge.converters.tensors import LazyTensor, columns, join_rows, rows, scaled
from ckptbridge.converters.upcycling.factors import Factors
from ckptbridge.converters.upcycling.gathered import gathered_columns, gathered_rows

Neurons = range | Tensor
"""Numbers of neurons: a run of them, or any of them in any order (int64)."""


@dataclass(frozen=True, slots=True)
class Expert:
    """The matrices of one expert as Megatron-Core packs them: fc1 is [gate_proj; up_proj] of a gated unit."""

    fc1: LazyTensor
    fc2: LazyTensor


@dataclass(frozen=True, slots=True)
class DenseMlp:
    """fc1 [2F, H], gate_proj above up_proj, or [F, H] without a gate; fc2 [H, F]."""

    layer: int
    fc1: LazyTensor
    fc2: LazyTensor
    width: int
    is_gated: bool

    def expert(self, neurons: Neurons, factors: Factors) -> Expert:
        """The expert of these neurons, its matrices multiplied by the factors."""
        up = scaled(_rows(self.fc1, neurons, self.width if self.is_gated else 0), factors.up)
        gate = [scaled(_rows(self.fc1, neurons, 0), factors.gate)] if self.is_gated else []
        return Expert(join_rows([*gate, up]), scaled(_columns(self.fc2, neurons), factors.down))


def _rows(tensor: LazyTensor, neurons: Neurons, first: int) -> LazyTensor:
    if isinstance(neurons, range):
        return rows(tensor, first + neurons.start, first + neurons.stop)
    return gathered_rows(tensor, neurons + first)


def _columns(tensor: LazyTensor, neurons: Neurons) -> LazyTensor:
    if isinstance(neurons, range):
        return columns(tensor, neurons.start, neurons.stop)
    return gathered_columns(tensor, neurons)
