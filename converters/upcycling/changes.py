"""What is changed in an expert after it was cut: neurons drawn anew (Drop-Upcycling), and noise.

Drop-Upcycling (arXiv 2502.19261) forgets a share r of each expert's neurons: what the paper calls the intermediate
dimension's index set S has its rows of gate_proj and up_proj and its columns of down_proj drawn from N(mean, std) of
the entries that are dropped, matrix by matrix. Its released code draws another S for each of the three matrices, so
that only (1-r)^3 of the neurons stay whole.

The numbers are drawn in blocks of rows, each by a generator of its own: a range of rows is the same whoever reads it.
Shapes: F width of an expert, H hidden_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ckptbridge.converters.tensors import LazyTensor, join_rows, rows
from ckptbridge.converters.upcycling.drawn import generator_for
from ckptbridge.converters.upcycling.factors import Factors
from ckptbridge.converters.upcycling.neuron_sums import Matrix, NeuronSums
from ckptbridge.converters.upcycling.neurons import DenseMlp, Expert, Neurons
from ckptbridge.converters.upcycling.spec import UpcycleSpec

BLOCK_ROWS = 32
"""Rows that one generator draws."""


class Changes:
    """What a resolved spec changes in the experts of one MLP; the statistics are read once, when first needed."""

    def __init__(self, spec: UpcycleSpec, mlp: DenseMlp, factors: Factors) -> None:
        self._spec, self._mlp, self._factors = spec, mlp, factors
        self._drops = spec.method == "drop" and spec.drop_ratio > 0
        self._sums = NeuronSums(mlp)

    def of(self, expert: Expert, number: int, neurons: Neurons) -> Expert:
        """Expert `number`, which holds these neurons, as the spec changes it; the same object if it does not."""
        if not self._drops and not self._spec.noise:
            return expert
        width = len(neurons)
        up = self._changed(rows(expert.fc1, expert.fc1.shape[0] - width, expert.fc1.shape[0]), "up", number, neurons)
        first: list[LazyTensor] = []
        if self._mlp.is_gated:
            first.append(self._changed(rows(expert.fc1, 0, width), "gate", number, neurons))
        return Expert(join_rows([*first, up]), self._changed(expert.fc2, "down", number, neurons))

    def _changed(self, base: LazyTensor, matrix: Matrix, number: int, neurons: Neurons) -> LazyTensor:
        change = Change(
            names=(self._spec.seed, self._mlp.layer, number, matrix),
            dropped=self._dropped(matrix, number, len(neurons)),
            noise=self._spec.noise,
            sums=self._sums,
            matrix=matrix,
            neurons=torch.arange(neurons.start, neurons.stop) if isinstance(neurons, range) else neurons,
            factor=getattr(self._factors, matrix),
        )
        return ChangedMatrix(base, change)

    def _dropped(self, matrix: Matrix, number: int, width: int) -> Tensor | None:
        """Which of an expert's neurons are drawn anew in a matrix, [F] bool."""
        if not self._drops:
            return None
        apart = (matrix,) if self._spec.drop_mask == "per-matrix" else ()
        generator = generator_for(self._spec.seed, "dropped", self._mlp.layer, number, *apart)
        is_dropped_F = torch.zeros(width, dtype=torch.bool)
        is_dropped_F[torch.randperm(width, generator=generator)[: round(width * self._spec.drop_ratio)]] = True
        return is_dropped_F


@dataclass(frozen=True)
class Change:
    """What is done to one matrix of one expert. `names` are of its own random numbers; `factor` is in it already."""

    names: tuple[int, int, int, Matrix]
    dropped: Tensor | None
    noise: float
    sums: NeuronSums
    matrix: Matrix
    neurons: Tensor
    factor: float

    @cached_property
    def moments(self) -> tuple[float, float]:
        """Mean and standard deviation of the entries that are dropped."""
        mean, std = self.sums.moments(self.matrix, self.neurons[self.dropped])
        return mean * self.factor, std * abs(self.factor)

    @cached_property
    def noise_std(self) -> float:
        return self.noise * self.sums.root_mean_square(self.matrix, self.neurons) * abs(self.factor)

    def generator(self, kind: str, block: int) -> torch.Generator:
        seed, layer, number, matrix = self.names
        return generator_for(seed, kind, layer, number, matrix, block)


class ChangedMatrix(LazyTensor):
    """A matrix of an expert with a change; computed in fp32 and rounded once, what is not changed stays bit by bit."""

    def __init__(self, base: LazyTensor, change: Change) -> None:
        self.base, self.change, self.shape, self.dtype = base, change, base.shape, base.dtype

    def bases(self) -> Sequence[LazyTensor]:
        return (self.base,)

    def read_rows(self, start: int, stop: int) -> Tensor:
        made = torch.empty(stop - start, *self.shape[1:])
        made.copy_(self.base.read_rows(start, stop))
        for block in range(start // BLOCK_ROWS, -(-stop // BLOCK_ROWS)):
            first, last = block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, self.shape[0])
            low, high = max(first, start), min(last, stop)
            part, wanted = made[low - start : high - start], slice(low - first, high - first)
            if self.change.dropped is not None:
                self._redraw(part, self.change.dropped, block, first, last, wanted)
            if self.change.noise:
                drawn = torch.randn(last - first, *self.shape[1:], generator=self.change.generator("noise", block))
                part += drawn[wanted] * self.change.noise_std
        return made.to(self.dtype)

    def _redraw(self, part: Tensor, dropped_F: Tensor, block: int, first: int, last: int, wanted: slice) -> None:
        """Replace the dropped entries of rows `wanted` of the block [first, last); `part` is those rows."""
        generator = self.change.generator("drawn anew", block)
        if self.change.matrix == "down":
            if dropped_F.any():
                mean, std = self.change.moments
                drawn = torch.randn(last - first, int(dropped_F.sum()), generator=generator)
                part[:, dropped_F] = drawn[wanted] * std + mean
            return
        is_new = dropped_F[first:last]
        if is_new[wanted].any():
            mean, std = self.change.moments
            fresh = torch.empty(last - first, self.shape[1])
            fresh[is_new] = torch.randn(int(is_new.sum()), self.shape[1], generator=generator) * std + mean
            part[is_new[wanted]] = fresh[wanted][is_new[wanted]]

    @property
    def work_row_nbytes(self) -> int:
        return self.base.work_row_nbytes + self.row_nbytes + 4 * 4 * self.shape[1]
