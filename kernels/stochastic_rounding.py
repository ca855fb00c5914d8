"""Rounding fp32 to bf16 up or down at random, so that on average nothing is lost.

Of a number between two neighbours in bf16 the upper one is taken with the probability that makes the mean right: 16
random bits are added to the 16 bits that bf16 lacks, and what is left of those is cut off. The bits are a hash of the
step and the element's position, so that the same step gives the same bits on every device, at every launch geometry,
and after a resume.
"""

# The hash is a multiply-xorshift mix of 32 bits, with the factors of C. Wellons' lowbias32; of a position beyond 2^32
# the upper half is folded in.

from __future__ import annotations

import torch
from torch import Tensor

from ckptbridge.kernels.backend import jit, tl

_WORD = 0xFFFFFFFF
_WEYL = 0x9E3779B1
_FIRST_FACTOR, _SECOND_FACTOR = 0x7FEB352D, 0x846CA68B


def keys(step: Tensor) -> Tensor:
    """The step's share of the hash, an int64 tensor below 2^32 on the step's device."""
    return _mixed(step.long() * _WEYL & _WORD)


def stochastic_bf16(x: Tensor, step: Tensor, first: int = 0) -> Tensor:
    """x, flat and of fp32 numbers, rounded to bf16 at random; its elements stand at positions first, first + 1, ...

    NaN stays NaN and infinity infinity.
    """
    positions = torch.arange(first, first + x.numel(), device=x.device)
    folded = (positions ^ (positions >> 32) * _WEYL ^ keys(step)) & _WORD
    cut_off = (x.view(torch.int32) + (_mixed(folded) & 0xFFFF).int()) & -0x10000
    return torch.where(x.isnan(), x, cut_off.view(torch.float32)).bfloat16()


def _mixed(x: Tensor) -> Tensor:
    """32 bits in int64, so mixed that each of them changes with every bit of x."""
    x = x ^ x >> 16
    x = x * _FIRST_FACTOR & _WORD
    x = x ^ x >> 15
    x = x * _SECOND_FACTOR & _WORD
    return x ^ x >> 16


@jit
def rounded_at_random(x, positions, key):
    """The same inside a kernel: x as fp32 numbers that bf16 holds exactly. positions: int64; key: of `keys`."""
    bits = positions.to(tl.uint32) ^ (positions >> 32).to(tl.uint32) * 0x9E3779B1 ^ key.to(tl.uint32)
    bits ^= bits >> 16
    bits *= 0x7FEB352D
    bits ^= bits >> 15
    bits *= 0x846CA68B
    bits ^= bits >> 16
    cut_off = (x.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)) & 0xFFFF0000
    return tl.where(x == x, cut_off.to(tl.float32, bitcast=True), x)
