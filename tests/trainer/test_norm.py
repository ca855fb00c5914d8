"""A norm of the residual stream and what is pending: one pass or several, the same numbers, and what is kept of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.trainer.norm import norm, sum_and_norm
from ckptbridge.trainer.recompute import forgetting

CONFIG = ModelConfig(
    num_layers=1,
    hidden_size=24,
    ffn_hidden_size=8,
    num_attention_heads=2,
    num_query_groups=1,
    kv_channels=8,
    vocab_size=9,
)
KINDS = {
    "llama": {},
    "gemma": {"layernorm_zero_centered_gamma": True},
    "layernorm": {"normalization": "LayerNorm"},
}


def drawn(*, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The stream, what is pending, weight, bias, and the gradients of sum and norm."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 24), (2, 5, 24), (24,), (24,), (2, 5, 24), (2, 5, 24))
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [tensor.requires_grad_(i < 4) for i, tensor in enumerate(tensors)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sum_and_norm_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    config = replace(CONFIG, **KINDS[kind])
    x, pending, weight, bias, *gradients = drawn(dtype=dtype)
    bias = bias if kind == "layernorm" else None
    leaves = [x, pending, weight] + ([] if bias is None else [bias])
    found = sum_and_norm(x, pending, weight, bias, config, "reference")
    summed = x + pending
    expected = (summed, norm(summed, weight, bias, config, "reference"))
    assert all(map(torch.equal, found, expected))
    found, expected = (torch.autograd.grad(outputs, leaves, gradients) for outputs in (found, expected))
    assert all(map(torch.equal, found, expected))


def test_without_a_pending_part_or_a_weight() -> None:
    x, pending, weight, *_ = drawn()
    summed, normed = sum_and_norm(x, None, weight, None, CONFIG, "reference")
    assert summed is x
    assert torch.equal(normed, norm(x, weight, None, CONFIG, "reference"))
    summed, normed = sum_and_norm(x, pending, None, None, CONFIG, "reference")
    assert summed is normed
    assert torch.equal(summed, x + pending)


@pytest.mark.parametrize("kind", KINDS)
def test_the_normed_rows_are_not_kept_when_they_may_be_forgotten(kind: str) -> None:
    config = replace(CONFIG, **KINDS[kind])
    x, pending, weight, bias, *_ = drawn()
    bias = bias if kind == "layernorm" else None
    matrix = torch.randn(24, 7, requires_grad=True)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with forgetting(pack, lambda tensor: tensor):
        _, normed = sum_and_norm(x, pending, weight, bias, config, "reference")
        out = normed @ matrix
    assert normed.data_ptr() not in kept
    found = torch.autograd.grad(out.sum(), (x, pending, weight, matrix))
    expected = norm(x + pending, weight, bias, config, "reference") @ matrix
    expected = torch.autograd.grad(expected.sum(), (x, pending, weight, matrix))
    assert all(map(torch.equal, found, expected))
