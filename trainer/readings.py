"""Numbers of a step that lie on the device, brought to the host together: one transfer, one wait."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Readings:
    """Tensors of any shape by name, packed into one fp32 vector that a CUDA graph may overwrite at each replay."""

    packed: Tensor
    shapes: dict[str, tuple[int, ...]]

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> Readings:
        """Pack the tensors; counts stay whole numbers up to 2^24, beyond which fp32 has gaps."""
        packed = torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors.values()])
        return Readings(packed, {name: tuple(tensor.shape) for name, tensor in tensors.items()})

    def read(self) -> dict[str, Any]:
        """Wait for the device; by name a float, or a list of floats for a vector, of lists for a matrix."""
        values, start, found = self.packed.cpu(), 0, dict[str, Any]()
        for name, shape in self.shapes.items():
            found[name] = values[start : (start := start + prod(shape))].view(shape).tolist()
        return found
