"""Where parameters lie in flat buffers, that they are views of them, and that nothing leaks between them."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from ckptbridge.kernels.main_gradient import main_gradient_of
from ckptbridge.trainer.flat_groups import ALIGNED, FlatGroup, flat_groups
from ckptbridge.trainer.optimizer import Optimizer
from ckptbridge.trainer.recipe import OptimizerSection


class Net(nn.Module):
    """A matrix under two names, vectors, stacks of matrices and of biases, a parameter of another dtype."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(7, 19).bfloat16()
        self.stacked = nn.Parameter(torch.randn(3, 5, 16).bfloat16())
        self.stacked_bias = nn.Parameter(torch.randn(3, 5).bfloat16())
        self.tied = self.first
        self.scale = nn.Parameter(torch.randn(ALIGNED).bfloat16())
        self.wide = nn.Parameter(torch.randn(300))


def grouped(net: nn.Module) -> list[FlatGroup]:
    return flat_groups(dict(net.named_parameters()), weight_decay=0.1, moments=torch.float32)


def test_groups_by_dtype_and_decay() -> None:
    groups = grouped(Net())
    assert [(list(group.slots), group.weight.dtype, group.weight_decay) for group in groups] == [
        (["stacked", "first.weight"], torch.bfloat16, 0.1),
        (["stacked_bias", "scale", "first.bias"], torch.bfloat16, 0.0),
        (["wide"], torch.float32, 0.0),
    ]


def test_slots_are_aligned_apart_and_explicit() -> None:
    groups = grouped(Net())
    at = 0
    for group in groups:
        assert group.first == at, "positions of groups overlap"
        at += group.numel
        assert group.numel % ALIGNED == 0
        end = 0
        for slot in group.slots.values():
            assert slot.start % ALIGNED == 0
            assert slot.start >= end
            assert slot.stop - slot.start == slot.shape.numel()
            end = slot.stop
        assert end <= group.numel
    assert [(slot.start, slot.stop) for slot in groups[0].slots.values()] == [(0, 240), (256, 389)]
    assert groups[0].numel == 512


def test_parameters_keep_their_values_and_become_views() -> None:
    net = Net()
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    storages = [weakref.ref(parameter.untyped_storage()) for parameter in net.parameters()]
    groups = grouped(net)
    for group in groups:
        for name in group.slots:
            parameter = net.get_parameter(name)
            assert torch.equal(parameter, before[name])
            assert parameter.is_contiguous()
            assert parameter.requires_grad
            assert parameter.untyped_storage().data_ptr() == group.weight.untyped_storage().data_ptr()
            assert torch.equal(group.slots[name].of(group.main), before[name].float())
            main_gradient = main_gradient_of(parameter)
            assert main_gradient is not None
            assert main_gradient.tensor.data_ptr() == group.slots[name].of(group.gradient).data_ptr()
    assert net.tied.weight is net.first.weight
    assert all(storage() is None for storage in storages), "the memory that held a parameter is still there"


def test_fp32_weights_are_the_main_weights() -> None:
    first, _, wide = grouped(Net())
    assert wide.rounded_weight is None
    assert wide.main is wide.weight
    assert first.rounded_weight is first.weight
    assert first.main.dtype == torch.float32


def between(group: FlatGroup, flat: torch.Tensor) -> torch.Tensor:
    """The elements that are no parameter's."""
    is_padding = torch.ones(group.numel, dtype=torch.bool)
    for slot in group.slots.values():
        is_padding[slot.start : slot.stop] = False
    return flat[is_padding]


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_what_lies_between_parameters_stays_zero(moments) -> None:
    net = Net()
    optimizer = Optimizer(net, OptimizerSection(moments=moments))
    for step in range(3):
        for parameter in net.parameters():
            main_gradient_of(parameter).add(torch.full_like(parameter, 1.0 + step))
        optimizer.step(1e-2)
    for group in optimizer._groups:
        for flat in (group.weight, group.main, group.gradient, group.exp_avg, group.exp_avg_sq):
            assert not between(group, flat).any()
        assert between(group, group.main).numel() > 0 or group.numel == sum(
            s.shape.numel() for s in group.slots.values()
        )


def test_gradients_of_autograd_and_of_operations_add_up() -> None:
    net = Net()
    (group, *_) = grouped(net)
    net.stacked.sum().backward()
    assert net.stacked.grad is None
    main_gradient_of(net.stacked).add(torch.ones(3, 5, 16))
    net.stacked.float().mul(2).sum().backward()
    group.finish_gradient()
    gradient = group.slots["stacked"].of(group.gradient)
    assert gradient.eq(4).all()
    assert not group.slots["first.weight"].of(group.gradient).any()  # nothing came, and nothing is left over
    net.stacked.sum().backward()
    group.finish_gradient()
    assert group.slots["stacked"].of(group.gradient).eq(1).all()
    group.finish_gradient()
    assert not group.gradient.any()


def test_stretches_are_those_whose_squares_nobody_knows() -> None:
    net = Net()
    (group, *_) = grouped(net)
    squares = torch.tensor([5.0])

    def stretches(*known: str) -> list[tuple[int, int]]:
        for name in group.slots:
            main_gradient = main_gradient_of(net.get_parameter(name))
            main_gradient.add(torch.ones(group.slots[name].shape))
            main_gradient.squares = squares if name in known else None
        unknown, found = group.finish_gradient()
        assert len(found) == len(known)
        assert all(numbers is squares for numbers in found)
        return [(piece.storage_offset(), len(piece)) for piece in unknown]

    assert stretches() == [(0, 512)]
    assert stretches("stacked") == [(256, 256)]
    assert stretches("first.weight") == [(0, 256)]
    assert stretches("stacked", "first.weight") == []
