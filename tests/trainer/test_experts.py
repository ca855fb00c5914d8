"""The routed experts of a decoder, with every kind of activation: a loop over tokens and choices, and its gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.kernels.main_gradient import MainGradient, set_main_gradient
from ckptbridge.kernels.order import order_by_expert
from ckptbridge.trainer.activations import activated
from ckptbridge.trainer.mixture import Experts, fused_activation

T, E, K, H, F = 37, 6, 2, 20, 12
PLAIN = ModelConfig(
    num_layers=1,
    hidden_size=H,
    ffn_hidden_size=F,
    num_attention_heads=2,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=8,
    num_moe_experts=E,
    moe_ffn_hidden_size=F,
    moe_router_topk=K,
)
KINDS = {
    "swiglu": PLAIN,
    "squared_relu": replace(PLAIN, activation_func="squared_relu", gated_linear_unit=False),
    "gelu": replace(PLAIN, activation_func="gelu", gated_linear_unit=False),
    "gelu of a gated unit": replace(PLAIN, activation_func="gelu_tanh"),
    "clamped swiglu with biases": replace(
        PLAIN,
        activation_func="quick_gelu",
        activation_func_clamp_value=1.0,
        glu_linear_offset=1.0,
        add_mlp_bias=True,
    ),
    "swiglu with biases": replace(PLAIN, add_mlp_bias=True),
}


def module(config: ModelConfig) -> Experts:
    experts = Experts(config, "reference")
    generator = torch.Generator().manual_seed(1)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return experts


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, weights, choices (expert 4 meets no token, some meet expert 5 twice) and the output's gradient."""
    generator = torch.Generator().manual_seed(seed)
    x_TH, d_TH = torch.randn(2, T, H, generator=generator).unbind()
    weights_TK = torch.rand(T, K, generator=generator)
    experts_TK = torch.rand(T, E, generator=generator).topk(K).indices
    return x_TH.requires_grad_(), weights_TK.requires_grad_(), experts_TK.masked_fill(experts_TK == 4, 5), d_TH


def by_a_loop(x_TH: Tensor, weights_TK: Tensor, experts_TK: Tensor, experts: Experts, is_kept: Tensor) -> Tensor:
    fc1, fc2 = experts.experts["linear_fc1"], experts.experts["linear_fc2"]
    rows = []
    for t, chosen in enumerate(experts_TK.tolist()):
        total = torch.zeros(H)
        for k, e in enumerate(chosen):
            h = fc1.weight[e] @ x_TH[t] + (0 if fc1.bias is None else fc1.bias[e])
            y = fc2.weight[e] @ activated(h, experts.config, "reference")
            y = y if fc2.bias is None else y + fc2.bias[e]
            total = total + weights_TK[t, k] * y * is_kept[t, k]
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("capacity", "pads"), [(None, False), (9, False), (14, True)], ids=["dropless", "dropping", "padded"]
)
@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS.keys())
def test_output_and_gradients_equal_a_loop(config: ModelConfig, capacity: int | None, pads: bool) -> None:
    experts = module(config)
    x_TH, weights_TK, experts_TK, d_TH = inputs()
    order = order_by_expert(experts_TK, E, capacity=capacity, drop_policy="position", pad_to_capacity=pads)
    is_kept = order.rows_TK >= 0
    assert bool(is_kept.all()) == (capacity is None)
    leaves = [x_TH, weights_TK, *experts.parameters()]
    results = []
    for out in (experts(x_TH, weights_TK, order), by_a_loop(x_TH, weights_TK, experts_TK, experts, is_kept)):
        results.append([out, *torch.autograd.grad(out, leaves, d_TH)])
    for ours, loop in zip(*results, strict=True):
        torch.testing.assert_close(ours, loop, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [KINDS["swiglu"], KINDS["gelu"]], ids=["fused", "composed"])
def test_gradients_of_matrices_add_up_in_their_main_gradients(config: ModelConfig) -> None:
    experts = module(config)
    x_TH, weights_TK, experts_TK, d_TH = inputs()
    order = order_by_expert(experts_TK, E)
    weights = list(experts.parameters())
    expected = torch.autograd.grad(experts(x_TH, weights_TK, order), weights, d_TH)
    mains = [MainGradient(torch.full_like(weight, torch.nan)) for weight in weights]
    for weight, main in zip(weights, mains, strict=True):
        set_main_gradient(weight, main)
    for _ in range(2):
        experts(x_TH, weights_TK, order).backward(d_TH)
    for weight, main, once in zip(weights, mains, expected, strict=True):
        assert weight.grad is None
        torch.testing.assert_close(main.finish(), 2 * once)


def test_what_is_fused() -> None:
    assert [fused_activation(config) for config in KINDS.values()] == ["swiglu", "squared_relu", *4 * [None]]
