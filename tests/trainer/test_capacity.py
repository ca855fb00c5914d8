"""A mixture whose experts have a capacity, against a loop over tokens; the z-loss in the gradient of a step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ckptbridge.converters.errors import BadInputError
from ckptbridge.kernels.order import expert_capacity
from ckptbridge.trainer.activations import activated
from ckptbridge.trainer.capacity import Capacity
from ckptbridge.trainer.decoder import Decoder
from ckptbridge.trainer.loading import empty_decoder
from ckptbridge.trainer.mixture import Mixture, limit_experts
from ckptbridge.trainer.recipe_file import parse_recipe, with_overrides
from ckptbridge.trainer.step import accumulate_gradients
from tests.kernels.poison import poisoned_memory
from tests.tiny import build_tiny, token_ids
from tests.trainer.packing import config_of, packed

T = 29
RECIPE = {
    "run_folder": "runs/x",
    "model": {"init_from": "somewhere"},
    "data": {"text": ["*.py"]},
    "schedule": {"total_steps": 3},
}
CAPACITIES = [
    Capacity(factor=factor, drop_policy=policy, pads=pads)
    for policy in ("probs", "position")
    for factor in (0.6, 1.0, 8.0)
    for pads in (False, True)
]


@pytest.mark.parametrize("factor", [8.0, 1e308])
def test_a_factor_however_large_drops_nothing(factor: float) -> None:
    """The largest that a recipe takes: times the even share it is infinite."""
    parse_recipe(with_overrides(RECIPE, [f"moe.capacity_factor={factor}"]))
    assert [expert_capacity(tokens, 3, 2, factor) for tokens in (0, 1, 29)] == [0, 1, 29]
    dropping, whole = mixture("mixtral"), mixture("mixtral")
    limit_experts(dropping[0], Capacity(factor=factor))
    assert torch.equal(dropping[0](dropping[1])[0], whole[0](whole[1])[0])


def mixture(name: str, backend: str = "reference") -> tuple[Mixture, Tensor]:
    """The mixture of a tiny model with random weights, and tokens that one expert likes most."""
    generator = torch.Generator().manual_seed(1)
    made = Mixture(config_of(build_tiny(name).config), backend)
    for parameter in made.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    x_TH = torch.randn(T, made.router.weight.shape[1], generator=generator)
    return made, x_TH + 0.3 * made.router.weight[1].detach()


def kept_choices(made: Mixture, x_TH: Tensor, capacity: Capacity) -> list[tuple[int, int, Tensor]]:
    """Token, expert and weight of each choice that is not dropped."""
    routes = made.router(x_TH)
    experts, topk = len(made.router.weight), routes.experts_TK.shape[1]
    limit = T if capacity.factor is None else expert_capacity(T, topk, experts, capacity.factor)
    kept = []
    for expert in range(experts):
        own = [(t, routes.weights_TK[t, k]) for t in range(T) for k in range(topk) if routes.experts_TK[t, k] == expert]
        if capacity.drop_policy == "probs":
            own.sort(key=lambda choice: -choice[1].item())
        kept += [(token, expert, weight) for token, weight in own[:limit]]
    return kept


def by_a_loop(made: Mixture, x_TH: Tensor, capacity: Capacity) -> Tensor:
    fc1, fc2 = made.experts.experts["linear_fc1"], made.experts.experts["linear_fc2"]
    out = [torch.zeros_like(x) for x in x_TH]
    for token, expert, weight in kept_choices(made, x_TH, capacity):
        biases = (None, None) if fc1.bias is None else (fc1.bias[expert], fc2.bias[expert])
        hidden = activated(F.linear(x_TH[token], fc1.weight[expert], biases[0]), made.experts.config, "reference")
        out[token] = out[token] + weight * F.linear(hidden, fc2.weight[expert], biases[1])
    routed_TH = torch.stack(out)
    return routed_TH if made.shared_experts is None else routed_TH + made.shared_experts(x_TH)


@pytest.mark.parametrize("capacity", CAPACITIES, ids=lambda c: f"{c.drop_policy}-{c.factor}-{c.pads}")
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss"])
@poisoned_memory()
def test_a_mixture_that_drops_equals_a_loop(name: str, capacity: Capacity) -> None:
    made, x_TH = mixture(name)
    limit_experts(made, capacity)
    leaves = [x_TH.requires_grad_(), *made.parameters()]
    d_out = torch.randn(x_TH.shape, generator=torch.Generator().manual_seed(2))
    out_TH, balance = made(x_TH)
    expected_TH = by_a_loop(made, x_TH, capacity)
    torch.testing.assert_close(out_TH, expected_TH, rtol=1e-4, atol=1e-4)
    actual = torch.autograd.grad(out_TH, leaves, d_out, allow_unused=True, materialize_grads=True)
    expected = torch.autograd.grad(expected_TH, leaves, d_out, allow_unused=True, materialize_grads=True)
    for ours, loop in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, loop, rtol=1e-3, atol=1e-3)
    assert balance.choices_E.sum() == T * made.router.topk  # the balance counts what was dropped too


def test_the_small_capacities_drop() -> None:
    made, x_TH = mixture("mixtral")
    assert [len(kept_choices(made, x_TH, Capacity(factor=factor))) < 2 * T for factor in (0.6, 1.0, 8.0)] == [
        True,
        True,
        False,
    ]


def tiny_decoder(name: str) -> Decoder:
    model = build_tiny(name)
    config = config_of(model.config)
    decoder = empty_decoder(config, "reference", torch.float32, torch.device("cpu"))
    decoder.load_state_dict(packed(model.state_dict(), config))
    return decoder


def test_a_capacity_that_nobody_reaches_changes_nothing() -> None:
    decoder = tiny_decoder("mixtral")
    expected = decoder(token_ids()).hidden_BSH
    limit_experts(decoder, Capacity(factor=100.0))
    assert torch.equal(decoder(token_ids()).hidden_BSH, expected)
    limit_experts(decoder, Capacity(factor=0.5))
    assert not torch.equal(decoder(token_ids()).hidden_BSH, expected)


def test_the_z_loss_is_in_the_gradient_of_a_step() -> None:
    decoder = tiny_decoder("qwen2_moe")
    batch = token_ids(4, 9)
    gradients, told = [], []
    for coefficient in (0.0, 0.5):
        told.append(accumulate_gradients(decoder, batch, 2, 0.01, coefficient).z_loss)
        gradients.append({name: p.grad.clone() for name, p in decoder.named_parameters()})
        decoder.zero_grad()
    loss = sum(decoder(half[:, :-1]).z_loss() for half in batch.split(2)) / 2
    assert told[0] is None
    torch.testing.assert_close(told[1], loss.detach() / len(decoder.decoder.layers))
    (0.5 * loss).backward()
    for name, parameter in decoder.named_parameters():
        added = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradients[1][name] - gradients[0][name], added, rtol=1e-3, atol=1e-5)
    assert decoder.get_parameter("decoder.layers.0.mlp.router.weight").grad.abs().max() > 1e-3


def test_a_dense_models_z_loss_is_zero() -> None:
    assert tiny_decoder("llama")(token_ids()).z_loss().item() == 0


def test_padding_needs_a_capacity() -> None:
    with pytest.raises(BadInputError, match="pad_to_capacity needs a capacity_factor"):
        parse_recipe(with_overrides(RECIPE, ["moe.pad_to_capacity=true"]))
    with pytest.raises(BadInputError, match="capacity_factor"):
        parse_recipe(with_overrides(RECIPE, ["moe.capacity_factor=0"]))
    recipe = parse_recipe(with_overrides(RECIPE, ["moe.pad_to_capacity=true", "moe.capacity_factor=1.5"]))
    assert (recipe.moe.capacity_factor, recipe.moe.drop_policy, recipe.moe.z_loss_coeff) == (1.5, "probs", 0.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("capacity", CAPACITIES, ids=lambda c: f"{c.drop_policy}-{c.factor}-{c.pads}")
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_a_gpu_drops_what_the_cpu_drops(name: str, capacity: Capacity) -> None:
    """fp32 on the triton backend against the reference on a CPU: output, balance and every gradient."""
    results = []
    for device, backend in (("cpu", "reference"), ("cuda", "triton")):
        made, x_TH = mixture(name, backend)
        made, x_TH = made.to(device), x_TH.to(device).requires_grad_()
        limit_experts(made, capacity)
        out_TH, balance = made(x_TH)
        loss = (out_TH * torch.linspace(-1, 1, out_TH.numel(), device=device).view_as(out_TH)).sum()
        leaves = [x_TH, *made.parameters()]
        gradients = torch.autograd.grad(
            loss + balance.loss + balance.z_loss, leaves, allow_unused=True, materialize_grads=True
        )
        results.append([out_TH, balance.choices_E, balance.loss, balance.z_loss, *gradients])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(theirs.cpu(), ours, rtol=1e-3, atol=1e-3)
