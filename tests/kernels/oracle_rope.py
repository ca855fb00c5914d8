"""The oracle of split_qkv: outputs and all gradients against the reference in fp64, within derived bounds."""

# Shapes: B sequences, S their length, G query groups, X heads of a group, N heads, D head dim, R pairs that turn.

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ckptbridge.kernels.rope import split_qkv_reference
from tests.kernels.cases import random_tensor
from tests.kernels.cases_rope import SplitQkvCase
from tests.kernels.poison import poisoned_memory
from tests.kernels.tolerances import FP32, INSIDE, REDUCTION, assert_close, unit_roundoff

SplitQkv = Callable[..., tuple[Tensor, Tensor, Tensor]]
NAMES = ("q", "k", "v")


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitQkvInputs:
    """Arguments and output gradients of one call."""

    qkv: Tensor
    cos: Tensor
    sin: Tensor
    weights: tuple[Tensor, Tensor] | tuple[None, None]
    eps: float
    d_outputs: tuple[Tensor, Tensor, Tensor]

    @property
    def arguments(self) -> tuple:
        return self.qkv, self.cos, self.sin, *self.weights, self.eps

    @property
    def leaves(self) -> list[Tensor]:
        return [leaf for leaf in (self.qkv, *self.weights) if leaf is not None]


def split_qkv_inputs(case: SplitQkvCase, device: torch.device, seed: int = 0) -> SplitQkvInputs:
    """Random inputs of a case; weights are spread around one as trained ones are."""
    generator = torch.Generator(device).manual_seed(seed)
    B, S, G, D = case.B, case.S, case.G, case.D

    def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = case.dtype) -> Tensor:
        return random_tensor(shape, dtype, generator, scale=scale)

    weights = (None, None)
    if (dtype := case.weight_dtype) is not None:
        weights = tuple(draw(D, scale=0.5, dtype=dtype).add_(1).requires_grad_() for _ in range(2))
    angles = draw(S, case.turned // 2, scale=3.0, dtype=torch.float32)
    return SplitQkvInputs(
        qkv=draw(B, S, G, case.per_group + 2, D, scale=case.scale).requires_grad_(),
        cos=angles.cos().to(case.dtype),
        sin=angles.sin().to(case.dtype),
        weights=weights,
        eps=case.eps,
        d_outputs=(draw(B, S, G * case.per_group, D), draw(B, S, G, D), draw(B, S, G, D)),
    )


@poisoned_memory()
def check_split_qkv(
    operation: SplitQkv, case: SplitQkvCase, device: torch.device, *, fused: bool = True, seed: int = 0
) -> None:
    """Run `operation` forward and backward on a case; AssertionError names the first result that is off.

    A fused backward pass is in fp32 up to its results; plain autograd (`fused=False`) rounds what lies between.
    """
    given = split_qkv_inputs(case, device, seed)
    before = [leaf.detach().clone() for leaf in given.leaves]
    actual = _run(operation, given)
    for leaf, copy in zip(given.leaves, before, strict=True):
        assert torch.equal(leaf, copy), "an input was written into"
    wide = _in_fp64(given)
    expected = _run(split_qkv_reference, wide)
    assert actual.keys() == expected.keys()
    for name, (roundings, noise) in _bounds(case, wide, fused).items():
        dtype = case.weight_dtype if "weight" in name else case.dtype
        assert actual[name].dtype == dtype, f"{name}: {actual[name].dtype}, not {dtype}"
        assert_close(name, actual[name], expected[name], roundings=roundings, noise=noise)


def _run(operation: SplitQkv, given: SplitQkvInputs) -> dict[str, Tensor]:
    outputs = operation(*given.arguments)
    # An output cut from its inputs shall show as a wrong gradient, not as an error inside autograd.
    followed = [(y, d) for y, d in zip(outputs, given.d_outputs, strict=True) if y.requires_grad]
    gradients = torch.autograd.grad(
        [y for y, _ in followed], given.leaves, [d for _, d in followed], materialize_grads=True
    )
    names = [*NAMES, *("d_qkv", "d_q_weight", "d_k_weight")[: len(gradients)]]
    return dict(zip(names, [*outputs, *gradients], strict=True))


def _in_fp64(given: SplitQkvInputs) -> SplitQkvInputs:
    weights = tuple(None if w is None else w.detach().double().requires_grad_() for w in given.weights)
    return SplitQkvInputs(
        qkv=given.qkv.detach().double().requires_grad_(),
        cos=given.cos.double(),
        sin=given.sin.double(),
        weights=weights,
        eps=given.eps,
        d_outputs=tuple(d.double() for d in given.d_outputs),
    )


def _partners(x: Tensor, turned: int) -> Tensor:
    """Each turned channel's partner; zero for those that do not turn."""
    return torch.cat([x[..., turned // 2 : turned], x[..., : turned // 2], torch.zeros_like(x[..., turned:])], -1)


@torch.no_grad()
def _bounds(case: SplitQkvCase, given: SplitQkvInputs, fused: bool) -> dict[str, tuple[int, Tensor | float]]:
    """(roundings, noise) of each result. `given` is in fp64."""
    u = unit_roundoff(case.dtype, given.qkv.device)
    inside = INSIDE + FP32 * math.sqrt(case.D)
    has_norm, turned = case.weight_dtype is not None, case.turned
    still = given.qkv.new_zeros(case.S, 1, case.D - turned)
    cos = torch.cat([given.cos[:, None].repeat(1, 1, 2), still + 1], -1).abs()
    sin = torch.cat([given.sin[:, None].repeat(1, 1, 2), still], -1).abs()
    # Rounded as a normalised head and again after the weight; then each product of the two, and their sum.
    before = 2 if has_norm else 0
    autograd = 0 if fused else 3  # what turns back, and through the norm, is rounded in between
    bounds: dict[str, tuple[int, Tensor | float]] = {"v": (0, 0.0)}
    d_parts: list[Tensor] = []
    *rows, values = given.qkv.split((case.per_group, 1, 1), dim=3)
    for name, x, weight, d_out in zip(NAMES, rows, given.weights, given.d_outputs, strict=False):
        x = x.flatten(2, 3)
        inverse_rms = torch.rsqrt(x.square().mean(-1, keepdim=True) + case.eps) if has_norm else 1.0
        normed = x * inverse_rms
        turns = normed if weight is None else normed * weight
        terms = turns.abs() * cos + _partners(turns.abs(), turned) * sin
        bounds[name] = (1, ((before + 1) * u + inside) * terms)

        d_terms = d_out.abs() * cos + _partners(d_out.abs(), turned) * sin
        if weight is None:
            d_parts.append((inside + autograd * u) * d_terms)
            continue
        d_rows = d_terms * weight.abs()
        projected = d_rows + normed.abs() * (d_rows * normed.abs()).mean(-1, keepdim=True)
        d_parts.append((inside + autograd * u) * inverse_rms * projected)
        weight_terms = (d_terms * normed).square().sum((0, 1, 2)).sqrt()  # sqrt(rows) of a term
        count = FP32 * math.sqrt(x.numel() / case.D)
        bounds[f"d_{name}_weight"] = (1, (REDUCTION * (1 + autograd) * u + inside + count) * weight_terms)
    d_q, d_k = d_parts
    d_q = d_q.unflatten(2, (case.G, case.per_group))
    bounds["d_qkv"] = (1, torch.cat([d_q, d_k[:, :, :, None], torch.zeros_like(values)], 3))
    return bounds
