"""Grouped products by QuACK (pip install "quack-kernels[cu13]"), the kernels that SonicMoE is built on: for comparison.

Where each expert's rows begin is read on the device, and a weight gradient is summed in fp32 in place, as in ours.
QuACK can read gathered rows where they stand, but has no sign for a row of padding, so rows come sorted here. Its
kernels are compiled at their first call, a second or two for each kind of product. The tile is QuACK's default: its own
search would compile and time dozens of them for every shape.
"""

# Shapes: R routed rows, E experts, K depth of a sum, N output columns; O outputs and I inputs of an expert.

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor
from torch.nn import functional as F


def quack_matmul(a_RK: Tensor, weight_EKN: Tensor, ends_E: Tensor) -> Tensor:
    """Each row times its expert's matrix: [R, N]. `weight_EKN` may be the transposed view of [E, N, K]."""
    out_RN = a_RK.new_empty(a_RK.shape[0], weight_EKN.shape[2])
    _interface().gemm(a_RK, weight_EKN, out=out_RN, cu_seqlens_m=_starts(ends_E), tuned=False)
    return out_RN


def quack_weight_gradient(d_RO: Tensor, x_RI: Tensor, ends_E: Tensor, out_EOI: Tensor, *, accumulate: bool) -> None:
    """Each expert's d^T x, written to fp32 or bf16 memory or added to fp32."""
    if accumulate:
        _interface().gemm_add_inplace(d_RO.t(), x_RI, out_EOI, cu_seqlens_k=_starts(ends_E), tuned=False)
    else:
        _interface().gemm(d_RO.t(), x_RI, out=out_EOI, cu_seqlens_k=_starts(ends_E), tuned=False)


def quack_obstacle(device: torch.device) -> str | None:
    """Why QuACK cannot run on `device`, as a clause; None when it can."""
    if device.type != "cuda":
        return f"its kernels are written for CUDA, not for {device.type}"
    if torch.cuda.get_device_capability(device)[0] < 9:
        return "its grouped products are written for Hopper and later GPUs"
    return _fault()


@functools.cache
def _fault() -> str | None:
    """Why QuACK cannot be imported, as a clause. Importing takes seconds, so it is done once."""
    try:
        _interface()
    except ImportError as error:
        return f'QuACK cannot be imported ({error}); pip install "quack-kernels[cu13]"'
    except Exception as error:  # it fingerprints its sources when it is imported, and raises what it likes
        return f"QuACK is installed and does not load ({repr(error).splitlines()[0]})"
    return None


def _interface():
    return importlib.import_module("quack.gemm_interface")


def _starts(ends_E: Tensor) -> Tensor:
    """Where each expert's rows begin, and behind them where the last one's end: int32 [E + 1]."""
    return F.pad(ends_E, (1, 0))
