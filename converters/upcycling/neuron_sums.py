"""Means and spreads of any set of neurons' weights, out of one pass over a dense MLP.

Shapes: F dense width, H hidden_size.
"""

from __future__ import annotations

import math
import threading
from typing import Literal, cast

import torch
from torch import Tensor

from ckptbridge.converters.tensors import LazyTensor
from ckptbridge.converters.upcycling.neurons import DenseMlp

Matrix = Literal["gate", "up", "down"]
_CHUNK_NBYTES = 4 << 20
"""Of the source at a time; the sums are made in fp64."""


class NeuronSums:
    """The sum and the sum of squares of each neuron's weights, matrix by matrix; read when first asked for, once."""

    def __init__(self, mlp: DenseMlp) -> None:
        self._mlp, self._lock = mlp, threading.Lock()
        self._known: dict[Matrix, Tensor] = {}

    def moments(self, matrix: Matrix, neurons: Tensor) -> tuple[float, float]:
        """Mean and standard deviation (the unbiased one) of what these neurons have in a matrix."""
        total, squares = cast(list[float], self._of(matrix)[:, neurons].sum(1).tolist())
        count = len(neurons) * self._mlp.fc2.shape[0]
        mean = total / count
        return mean, math.sqrt(max(squares - total * mean, 0.0) / max(count - 1, 1))

    def root_mean_square(self, matrix: Matrix, neurons: Tensor) -> float:
        """The root of the mean square of what these neurons have in a matrix."""
        squares = float(self._of(matrix)[1, neurons].sum())
        return math.sqrt(squares / (len(neurons) * self._mlp.fc2.shape[0]))

    def norms(self, matrix: Matrix) -> Tensor:
        """The norm of each neuron's row of gate_proj or up_proj, or of its column of down_proj, [F] in fp64."""
        return self._of(matrix)[1].sqrt()

    def _of(self, matrix: Matrix) -> Tensor:
        """[2, F] in fp64: sums, sums of squares."""
        with self._lock:
            if matrix not in self._known:
                self._known[matrix] = self._summed(matrix)
            return self._known[matrix]

    def _summed(self, matrix: Matrix) -> Tensor:
        mlp = self._mlp
        if matrix == "down":
            return _sums(mlp.fc2, 0, mlp.fc2.shape[0], along=0)
        first = mlp.width if matrix == "up" and mlp.is_gated else 0
        return _sums(mlp.fc1, first, first + mlp.width, along=1)


def _sums(tensor: LazyTensor, start: int, stop: int, along: Literal[0, 1]) -> Tensor:
    """Sums and sums of squares of rows [start, stop), of each column (`along` 0) or of each row (1)."""
    step = max(1, _CHUNK_NBYTES // tensor.work_row_nbytes)
    parts: list[Tensor] = []
    for at in range(start, stop, step):
        chunk = tensor.read_rows(at, min(at + step, stop)).double()
        parts.append(torch.stack([chunk.sum(along), chunk.square().sum(along)]))
    return torch.cat(parts, 1) if along else torch.stack(parts).sum(0)
