"""How far a result may be from the fp64 one: bounds for every element and for the rms, derived and not tuned.

Rounding k times to a dtype of unit roundoff u moves a value by at most k u of its own size. What else goes wrong
inside a kernel is an error of the terms that a value is made of, which may be far larger than the value: that part,
`noise`, is worked out beside each operation's oracle, from the constants below.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FP32 = 2.0**-24
# Arithmetic in fp32 inside a kernel: some eight operations of half a unit in the last place, of which a GPU's fast
# rsqrt, exp and division may each be off by two units.
INSIDE = 16 * FP32
# A sum of n terms with independent errors of up to e is off by e sqrt(n / 3) in standard deviation. Of 7168 such sums
# the largest is expected at 4 deviations; 6 are never seen. The sqrt(n) comes with the root of the sum of squares.
REDUCTION = 6 / math.sqrt(3)
# Below the smallest normal number (of fp32, and of bf16) a kernel may flush to zero.
FLUSHED = 2.0**-126


def unit_roundoff(dtype: torch.dtype, device: torch.device) -> float:
    """The largest relative error of one rounding to `dtype` by a kernel on `device`."""
    if dtype == torch.float32:
        return FP32
    if dtype != torch.bfloat16:
        raise ValueError(f"no tolerance is derived for {dtype}")
    # bf16 keeps 8 significant bits. A GPU rounds to nearest; Triton's interpreter cuts off: twice the error.
    return 2.0**-8 if device.type == "cuda" else 2.0**-7


@torch.no_grad()
def assert_close(name: str, actual: Tensor, expected: Tensor, *, roundings: int, noise: Tensor | float) -> None:
    """Compare with the fp64 `expected`: |error| <= roundings u |expected| + noise, and 1/sqrt(3) of that in the rms.

    The rms of errors spread evenly over [-b, b] is b / sqrt(3); where few elements dominate, chance adds its share.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    if actual.numel() == 0:
        return
    bound = expected.abs() * (roundings * unit_roundoff(actual.dtype, actual.device)) + noise + FLUSHED
    error = (actual.double() - expected).abs()
    beyond = ~(error <= bound)  # NaN is beyond
    if beyond.any():
        index = tuple(beyond.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int(beyond.sum())} of {beyond.numel()} elements are off, first at {index}: "
            f"{actual[index].item():.6g}, expected {expected[index].item():.6g} within {bound[index].item():.2g}"
        )
    dominant = (bound.square().sum().square() / bound.pow(4).sum()).item()  # numel if all bounds are equal
    share = min(1.0, (1 + 3 / math.sqrt(dominant)) / math.sqrt(3))
    found, allowed = _rms(error), share * _rms(bound)
    assert found <= allowed, f"{name}: rms error {found:.3g}, allowed {allowed:.3g}"


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()
