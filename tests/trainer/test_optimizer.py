"""AdamW against torch's own, the rule of decay, clipping, fp32 main weights behind bf16 ones, and what is saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.tensors import Checkpoint, InMemory
from ckptbridge.kernels.adam import adam_step
from ckptbridge.kernels.backend import Backend
from ckptbridge.kernels.main_gradient import MainGradient
from ckptbridge.trainer import flat_groups
from ckptbridge.trainer import optimizer as optimizer_file
from ckptbridge.trainer.flat_groups import FlatGroup
from ckptbridge.trainer.optimizer import STATE, Optimizer
from ckptbridge.trainer.recipe import OptimizerSection
from ckptbridge.trainer.schedule import Schedule


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(dtype)


def inputs(seed: int) -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))


def backward(net: nn.Module, seed: int, factor: float = 1.0) -> None:
    net(inputs(seed).to(next(net.parameters()).dtype)).square().sum().mul(factor).backward()


def check_against_torch_adamw(dtype: torch.dtype = torch.float32) -> None:
    """Five steps of two micro-batches. In bf16 torch's own gets our fp32 gradients, and main weights are compared."""
    ours = model(dtype)
    theirs = {name: nn.Parameter(parameter.detach().float()) for name, parameter in ours.named_parameters()}
    optimizer = Optimizer(ours, OptimizerSection(clip_grad=0.5, weight_decay=0.1, betas=(0.9, 0.95)))
    groups = [
        {"params": [p for p in theirs.values() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in theirs.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    for step in range(5):
        backward(ours, 2 * step)
        backward(ours, 2 * step + 1)
        if dtype == torch.float32:
            for micro_batch in (2 * step, 2 * step + 1):
                net = torch.func.functional_call(model(), theirs, inputs(micro_batch))
                net.square().sum().backward()
        else:
            for name, parameter in ours.named_parameters():
                theirs[name].grad = parameter.main_gradient.tensor.clone()
        norm = optimizer.step(1e-2)
        expected = torch.nn.utils.clip_grad_norm_(theirs.values(), 0.5)
        adam.step()
        adam.zero_grad()
        assert norm == pytest.approx(expected.item(), rel=1e-6)
        assert norm > 0.5
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(optimizer.main[name], theirs[name].detach(), rtol=1e-6, atol=1e-7)
        assert torch.equal(parameter, optimizer.main[name].to(dtype))
        for key in STATE[1:]:
            torch.testing.assert_close(
                optimizer.state()[key][name], adam.state[theirs[name]][key], rtol=1e-5, atol=1e-9
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_torch_adamw_with_clipping(dtype: torch.dtype) -> None:
    check_against_torch_adamw(dtype)


def _decays_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    def group(members: dict[str, nn.Parameter], *, weight_decay: float, **rest: Any) -> FlatGroup:
        return FlatGroup(members, weight_decay=weight_decay or 0.1, **rest)

    monkeypatch.setattr(flat_groups, "FlatGroup", group)


def _clips_the_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the moments instead of in front of them."""

    def step(*tensors: Tensor, lr: Tensor, coefficient: Tensor, **options: Any) -> None:
        adam_step(*tensors, lr=lr * coefficient, coefficient=None, **options)

    monkeypatch.setattr(optimizer_file, "adam_step", step)


def _forgets_the_bias_correction(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*tensors: Tensor, step: Tensor, **options: Any) -> None:
        adam_step(*tensors, step=step + 1e6, **options)

    monkeypatch.setattr(optimizer_file, "adam_step", step)


def _swaps_the_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(gradient: Tensor, main: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *rest: Any, **options: Any) -> None:
        adam_step(gradient, main, exp_avg_sq, exp_avg, *rest, **options)

    monkeypatch.setattr(optimizer_file, "adam_step", step)


def _keeps_the_last_steps_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlatGroup, "finish_gradient", lambda self: ([self.gradient], []))


def _loses_a_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MainGradient, "add", lambda self, gradient: self.target()[0].copy_(gradient))


@pytest.mark.parametrize(
    "plant",
    [
        _decays_everything,
        _clips_the_move,
        _forgets_the_bias_correction,
        _swaps_the_moments,
        _keeps_the_last_steps_gradients,
        _loses_a_micro_batch,
    ],
)
def test_the_comparison_catches(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check_against_torch_adamw()


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


def saved(optimizer: Optimizer) -> dict[str, Checkpoint]:
    """As a checkpoint has it: everything in fp32."""
    state = optimizer.state()
    return {key: {n: InMemory(t.float().clone()) for n, t in tensors.items()} for key, tensors in state.items()}


@pytest.mark.parametrize(
    ("dtype", "moments"),
    [(torch.float32, "fp32"), (torch.bfloat16, "fp32"), (torch.float32, "bf16"), (torch.bfloat16, "bf16")],
)
def test_its_state_continues_bit_for_bit(dtype: torch.dtype, moments: Literal["fp32", "bf16"]) -> None:
    whole, first, second = model(dtype), model(dtype), model(dtype)
    options = OptimizerSection(moments=moments)
    unbroken, before, after = (Optimizer(net, options) for net in (whole, first, second))
    for step in range(6):
        backward(whole, step)
        unbroken.step(1e-2)
    for step in range(3):
        backward(first, step)
        before.step(1e-2)
    state = saved(before)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.fill_(float("nan"))
    after.load(state, step=3)
    for step in range(3, 6):
        backward(second, step)
        after.step(1e-2)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    for key, tensors in unbroken.state().items():
        assert all(torch.equal(tensors[name], after.state()[key][name]) for name in tensors), key


def test_bf16_moments_take_half_the_memory_and_lead_to_about_the_same_weights() -> None:
    nets = model(), model()
    wide, narrow = (Optimizer(net, OptimizerSection(moments=m)) for net, m in zip(nets, ("fp32", "bf16"), strict=True))
    for step in range(20):
        for net, optimizer in zip(nets, (wide, narrow), strict=True):
            backward(net, step)
            optimizer.step(1e-3)
    for key in STATE[1:]:
        assert {tensor.dtype for tensor in wide.state()[key].values()} == {torch.float32}
        assert {tensor.dtype for tensor in narrow.state()[key].values()} == {torch.bfloat16}
    start = model()
    for a, b, c in zip(*(net.parameters() for net in (*nets, start)), strict=True):
        assert (a - b).norm() < 0.02 * (a - c).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_that_require_no_gradient_are_left_alone(dtype: torch.dtype) -> None:
    net = model(dtype)
    net[1].requires_grad_(False)
    optimizer = Optimizer(net, OptimizerSection(weight_decay=0.5))
    exact = {name: tensor.detach().float() + 1e-4 for name, tensor in net.named_parameters()}
    optimizer.load_weights({name: InMemory(tensor) for name, tensor in exact.items()})
    backward(net, 0)
    optimizer.step(0.1)
    for name, parameter in net.named_parameters():
        is_same = torch.equal(parameter, exact[name].to(dtype))
        assert is_same == name.startswith("1.")
    state = optimizer.state()
    for name in ("1.weight", "1.bias"):
        assert torch.equal(state["param"][name], exact[name])  # as it came, not as bf16 has it
        for key in STATE[1:]:
            assert state[key][name].shape == exact[name].shape
            assert not state[key][name].any()
    after = model(dtype)
    after[1].requires_grad_(False)
    again = Optimizer(after, OptimizerSection(weight_decay=0.5))
    again.load(saved(optimizer), step=1)
    for key, tensors in again.state().items():
        assert all(torch.equal(tensor, state[key][name]) for name, tensor in tensors.items())


def test_a_weight_without_a_contribution_has_a_gradient_of_zero() -> None:
    net = model()
    optimizer = Optimizer(net, OptimizerSection(weight_decay=0.0, clip_grad=0.0))
    backward(net, 0)
    optimizer.step(1e-3)
    before = {key: {n: t.clone() for n, t in tensors.items()} for key, tensors in optimizer.state().items()}
    net[0](inputs(1)).square().sum().backward()  # the second layer takes no part
    norm = optimizer.step(1e-3)
    assert norm == pytest.approx(sum(float(p.main_gradient.tensor.square().sum()) for p in net[0].parameters()) ** 0.5)
    torch.testing.assert_close(optimizer.state()["exp_avg"]["1.weight"], before["exp_avg"]["1.weight"] * 0.9)
    assert not torch.equal(optimizer.main["1.weight"], before["param"]["1.weight"])


def test_gradients_can_be_forgotten() -> None:
    net, other = model(), model()
    ours, theirs = Optimizer(net, OptimizerSection()), Optimizer(other, OptimizerSection())
    backward(net, 5)
    ours.forget_gradients()
    backward(net, 0)
    backward(other, 0)
    assert ours.step(1e-2) == theirs.step(1e-2)


def test_a_state_of_other_names_or_shapes_is_refused_before_anything_is_taken() -> None:
    net = model()
    optimizer = Optimizer(net, OptimizerSection())
    before = [parameter.detach().clone() for parameter in net.parameters()]
    state = saved(optimizer)
    state["param"] = {name: InMemory(torch.ones(tensor.shape)) for name, tensor in state["param"].items()}
    del state["exp_avg_sq"]["0.bias"]
    with pytest.raises(BadInputError, match=r"missing: 0\.bias"):
        optimizer.load(state, step=1)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))


def test_a_model_that_trains_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        Optimizer(model().requires_grad_(False), OptimizerSection())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_steps_replayed_as_a_graph_give_the_same_bits(backend: Backend, moments: Literal["fp32", "bf16"]) -> None:
    """And none of them waits for the device."""
    nets = [model(torch.bfloat16).cuda() for _ in range(2)]
    eager, replayed = (Optimizer(net, OptimizerSection(moments=moments), backend) for net in nets)
    x, lr = torch.empty(4, 5, dtype=torch.bfloat16, device="cuda"), torch.zeros((), device="cuda")

    def step(net: nn.Module, optimizer: Optimizer) -> Tensor:
        net(x).square().sum().backward()
        return optimizer.step_on_device(lr)

    graph, stream, norms = torch.cuda.CUDAGraph(), torch.cuda.Stream(), list[list[float]]()
    for number in range(6):
        x.copy_(inputs(number))
        lr.fill_(1e-2 / (1 + number))
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            first = step(nets[0], eager)
            torch.cuda.set_sync_debug_mode("error")
            second = step(nets[1], replayed) if number < 2 else None
            torch.cuda.set_sync_debug_mode("default")
        if number == 2:
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                kept = step(nets[1], replayed)
        if number >= 2:
            torch.cuda.synchronize()
            graph.replay()
            second = kept
        torch.cuda.synchronize()
        norms.append([first.item(), second.item()])
    assert all(a == b for a, b in norms)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("moments", "nbytes"), [("fp32", 18), ("bf16", 14)])
def test_memory_of_a_parameter(moments: Literal["fp32", "bf16"], nbytes: int) -> None:
    """2 weight + 4 main + 4 gradient + the moments, while it is built too."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    net = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(16))).to("cuda", torch.bfloat16)
    optimizer = Optimizer(net, OptimizerSection(moments=moments))
    for _ in range(2):
        optimizer.step(1e-3)
    count = sum(parameter.numel() for parameter in net.parameters())
    assert torch.cuda.max_memory_allocated() - before <= 1.01 * nbytes * count


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
