"""Which part of a step an operation belongs to: ranges around the decoder's modules while a profiler looks, and rules.

Nothing is marked unless `marked` is open, so that a run that is not profiled pays nothing.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.profiler import record_function

PARTS = (
    *("attention", "projections", "dense products", "router", "dispatch", "expert products", "activation", "combine"),
    *("norms", "head and loss", "optimizer", "other"),
)
RANGE = "part: "
"""What the names of ranges begin with; the class of a module follows, or a part."""

_ALONE = {
    "Norm": "norms",
    "_RmsNorm": "norms",
    "CoreAttention": "attention",
    "_SplitQkv": "attention",
    "Router": "router",
    "_RouterLogits": "router",
    "_Route": "router",
    "_GatherRows": "dispatch",
    "_SumRows": "combine",
    "_Swiglu": "activation",
    "Mixture": "dispatch",
    "Embedding": "other",
    "Layer": "norms",
    "_LinearCrossEntropy": "head and loss",
    **{part: part for part in PARTS},
}
"""Modules and operations (autograd functions) of which all belongs to one part."""
_MIXED = {
    "_Experts": ("expert products", "activation"),
    "Experts": ("expert products", "activation"),
    "SharedExperts": ("dense products", "activation"),
    "Mlp": ("dense products", "activation"),
    "SelfAttention": ("projections", "attention"),
    "LatentAttention": ("projections", "attention"),
    "NormLinear": (None, "norms"),
}
"""The part of matrix products, then of everything else; None leaves it to what stands around."""
_PRODUCT = re.compile(
    r"gemm|cutlass|nvjet|xmma|splitk|cublas|matmul_kernel|weight_gradient_kernel"
    r"|^aten::(mm|addmm|bmm|baddbmm|linear|matmul|_grouped_mm|_scaled_mm|_scaled_grouped_mm)$",
    re.IGNORECASE,
)


def part_of(name: str, around: Sequence[str]) -> str:
    """The part of a kernel or operation by its name and by the names of what it ran in, the innermost first."""
    is_product = _PRODUCT.search(name) is not None
    for outer in around:
        outer = outer.removeprefix(RANGE)
        if outer in _ALONE:
            return _ALONE[outer]
        if outer in _MIXED and (part := _MIXED[outer][0 if is_product else 1]) is not None:
            return part
    return "other"


@contextmanager
def marked(decoder: nn.Module) -> Generator[None]:
    """While this is open every module whose class has a rule runs in a range of its class's name."""
    handles: list[Any] = []
    for module in decoder.modules():
        name = type(module).__name__
        if name in _ALONE or name in _MIXED:
            marker = _Marker(RANGE + name)
            handles.append(module.register_forward_pre_hook(marker.enter))
            handles.append(module.register_forward_hook(marker.leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Marker:
    """Opens a range before a module and closes it behind; a module may run again before its backward pass."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._open: list[record_function] = []

    def enter(self, *_: Any) -> None:
        self._open.append(record_function(self._name))
        self._open[-1].__enter__()

    def leave(self, *_: Any) -> None:
        self._open.pop().__exit__(None, None, None)
