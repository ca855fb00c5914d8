"""Argument checks of the operations: a ValueError names the operation, the argument, what was expected, what came."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)


def check_tensor(operation: str, name: str, tensor: Tensor, *, like: Tensor | None = None) -> None:
    """Refuse what no kernel reads: other dtypes, gaps between elements, another device than that of `like`."""
    if tensor.dtype not in DTYPES:
        expected = " or ".join(map(str, DTYPES))
        raise ValueError(f"{operation}: {name}: expected dtype {expected}, found {tensor.dtype}")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{operation}: {name}: expected a contiguous tensor, found shape {tuple(tensor.shape)} "
            f"with strides {tensor.stride()}; call .contiguous()"
        )
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{operation}: {name}: expected device {like.device}, found {tensor.device}")


def check_shape(operation: str, name: str, tensor: Tensor, expected: tuple[int, ...], why: str) -> None:
    """Refuse a tensor whose shape is not `expected`; `why` says where the expectation comes from."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{operation}: {name}: expected shape {expected} ({why}), found {tuple(tensor.shape)}")
