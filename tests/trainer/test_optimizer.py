"""AdamW against torch's own, the rule of decay, clipping, and fp32 main weights behind bf16 ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ckptbridge.converters.tensors import InMemory
from ckptbridge.trainer.optimizer import Optimizer
from ckptbridge.trainer.recipe import OptimizerSection
from ckptbridge.trainer.schedule import Schedule


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(dtype)


def backward(net: nn.Module, seed: int, factor: float = 1.0) -> None:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
    net(x.to(next(net.parameters()).dtype)).square().sum().mul(factor).backward()


def test_equals_torch_adamw_with_clipping() -> None:
    ours, theirs = model(), model()
    optimizer = Optimizer(ours, OptimizerSection(clip_grad=0.5, weight_decay=0.1, betas=(0.9, 0.95)))
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    for step in range(5):
        backward(ours, step)
        backward(theirs, step)
        norm = optimizer.step(1e-2)
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        adam.step()
        adam.zero_grad()
        assert norm == pytest.approx(expected.item(), rel=1e-6)
        assert norm > 0.5
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_vectors_are_not_decayed_and_matrices_are() -> None:
    net = model()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = Optimizer(net, OptimizerSection(weight_decay=0.5))
    backward(net, 0, factor=0.0)
    optimizer.step(0.1)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter, before[name] * (0.95 if parameter.ndim > 1 else 1.0))


def test_small_updates_of_bf16_weights_are_not_lost() -> None:
    """Each step moves a weight of 1.0 by 1e-4, a fortieth of bf16's spacing: a bf16 weight would never move."""
    net = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        net.weight.fill_(1.0)
    optimizer = Optimizer(net, OptimizerSection(weight_decay=0.0))
    for _ in range(100):
        net(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        assert net.weight.grad is None
        optimizer.step(1e-4)
    assert optimizer.main["weight"].item() == pytest.approx(0.99, abs=1e-5)
    assert net.weight.item() == torch.tensor(0.99).bfloat16().item()


def test_bf16_gradients_of_many_micro_batches_are_summed_in_fp32() -> None:
    net = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    optimizer = Optimizer(net, OptimizerSection(clip_grad=0.0))
    for _ in range(512):
        net(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
    assert optimizer.step(0.0) == 512.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_state_continues_bit_for_bit(dtype: torch.dtype) -> None:
    whole, first, second = model(dtype), model(dtype), model(dtype)
    options = OptimizerSection()
    unbroken, before, after = (Optimizer(net, options) for net in (whole, first, second))
    for step in range(6):
        backward(whole, step)
        unbroken.step(1e-2)
    for step in range(3):
        backward(first, step)
        before.step(1e-2)
    saved = {
        key: {name: InMemory(tensor.clone()) for name, tensor in tensors.items()}
        for key, tensors in before.state().items()
    }
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.fill_(float("nan"))
    after.load(saved, step=3)
    for step in range(3, 6):
        backward(second, step)
        after.step(1e-2)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    for key, tensors in unbroken.state().items():
        assert all(torch.equal(tensors[name], after.state()[key][name]) for name in tensors), key


def test_schedule() -> None:
    schedule = Schedule(lr=1.0, min_lr=0.1, warmup_steps=4, total_steps=13)
    assert [schedule.at(step) for step in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]
    assert schedule.at(9) == pytest.approx(0.55)  # halfway between step 4 and step 14
    rates = [schedule.at(step) for step in range(4, 14)]
    assert rates == sorted(rates, reverse=True)
    assert 0.1 < schedule.at(13) < 0.13
    assert schedule.at(14) == schedule.at(99) == pytest.approx(0.1)


def test_schedule_without_warmup_starts_at_the_top() -> None:
    schedule = Schedule(lr=1.0, min_lr=0.0, warmup_steps=0, total_steps=1)
    assert schedule.at(1) == 1.0
