"""The chunked loss against torch's own, with gradients, at chunk borders and in bf16."""

from __future__ import annotations

import pytest
import torch

from ckptbridge.trainer import cross_entropy
from ckptbridge.trainer.cross_entropy import linear_cross_entropy

H, V = 24, 99


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 50])
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_equals_torch(tokens: int, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_TOKENS", 16)
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, H, generator=generator)
    weight = torch.randn(V, H, generator=generator)
    targets = torch.randint(V, (tokens,), generator=generator)
    results = []
    for chunked in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if chunked:
            loss = linear_cross_entropy(h, w, targets, divisor=tokens)
        else:
            loss = torch.nn.functional.cross_entropy(h @ w.t(), targets)
        (factor * loss).backward()
        results.append((loss.detach(), h.grad, w.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_unlikely_targets_keep_their_precision() -> None:
    """A target 200 nats below the best one: its probability underflows in fp32, its logarithm must not."""
    hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[200.0, 0.0], [0.0, 0.0]])
    assert linear_cross_entropy(hidden, weight, torch.tensor([1])).item() == 200.0


def test_without_gradients_none_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = torch.randn(4, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, torch.zeros(4, dtype=torch.long))
    assert not loss.requires_grad


def test_bf16_gradients_are_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one token: 512 equal gradients summed in bf16 would stop growing at 256 of them."""
    monkeypatch.setattr(cross_entropy, "CHUNK_TOKENS", 1)
    hidden = torch.ones(512, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.zeros(512, dtype=torch.long)).backward()
    assert weight.grad.flatten().tolist() == [-256.0, 256.0]
