"""A mixture of experts in place of an MLP, with or without a shared expert.

Shapes: T tokens, H hidden_size, F ffn width of an expert, E experts, K top-k, R = T*K routed rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.kernels.activation import Activation
from ckptbridge.kernels.experts import ProductsConfig, experts
from ckptbridge.kernels.gather import gather_rows, sum_rows
from ckptbridge.kernels.linear import linear
from ckptbridge.kernels.order import Order
from ckptbridge.trainer.activations import fc1_rows, hidden_units
from ckptbridge.trainer.capacity import Capacity
from ckptbridge.trainer.grouped_linear import grouped_linear
from ckptbridge.trainer.linear import Linear
from ckptbridge.trainer.products import ProductsName, refuse_widths
from ckptbridge.trainer.router import Router, load_balancing_loss, z_loss


@dataclass(frozen=True, slots=True)
class Balance:
    """How one layer's tokens were spread: choices per expert [E], the load-balancing loss (1 is even), the z-loss."""

    choices_E: Tensor
    loss: Tensor
    z_loss: Tensor


class Mixture(nn.Module):
    """Router, routed experts and, where the model has one, a shared expert that sees every token."""

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.capacity = Capacity()
        self.router = Router(config, backend)
        self.experts = Experts(config, backend)
        self.shared_experts = None
        if config.moe_shared_expert_intermediate_size:
            self.shared_experts = SharedExperts(config, backend)

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Balance]:
        """Output [T, H], and how the tokens were spread."""
        routes = self.router(x_TH)
        out_TH = self.experts(x_TH, routes.weights_TK, self.capacity.order(routes, self.backend))
        if self.shared_experts is not None:
            out_TH = out_TH + self.shared_experts(x_TH)
        return out_TH, Balance(routes.choices_E, load_balancing_loss(routes), z_loss(routes))


def limit_experts(decoder: nn.Module, capacity: Capacity) -> None:
    """Give every mixture of a decoder this capacity, in training and in evaluation, as Megatron-Core does."""
    for module in decoder.modules():
        if isinstance(module, Mixture):
            module.capacity = capacity


def use_products(decoder: nn.Module, products: ProductsName) -> None:
    """From now on the products of the decoder's experts are computed by `products`.

    Raises BadInputError for matrices whose widths they do not take.
    """
    for name, module in decoder.named_modules():
        if isinstance(module, Stacked):
            refuse_widths(products, name, module.weight.shape[1:])
        if isinstance(module, Stacked | Experts):
            module.products = products


class Experts(nn.Module):
    """The routed experts; their matrices are stacked. (Megatron's module tree names the level twice.)"""

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.config, self.backend = config, backend
        self.products: ProductsName = "auto"
        self.activation: Activation | None = fused_activation(config)
        number, hidden, bias = config.num_moe_experts or 0, config.hidden_size, config.add_mlp_bias
        ffn = config.moe_ffn_hidden_size or 0
        self.experts = nn.ModuleDict(
            {
                "linear_fc1": Stacked(number, fc1_rows(config, ffn), hidden, backend, bias=bias),
                "linear_fc2": Stacked(number, hidden, ffn, backend, bias=bias),
            }
        )

    def forward(self, x_TH: Tensor, weights_TK: Tensor, order: Order) -> Tensor:
        """The sum of what each token's experts give, by weight: [T, H]."""
        fc1, fc2 = self.experts["linear_fc1"], self.experts["linear_fc2"]
        if self.activation is not None:
            return experts(
                x_TH,
                weights_TK,
                order,
                fc1.weight,
                fc2.weight,
                activation=self.activation,
                backend=self.backend,
                config=ProductsConfig.from_shape(self.backend, x_TH, fc1.weight, fc2.weight, products=self.products),
            )
        x_RH = gather_rows(x_TH, order, backend=self.backend)
        hidden_RF = hidden_units(fc1(x_RH, order.ends_E), self.config, self.backend)
        return sum_rows(fc2(hidden_RF, order.ends_E), order, weights_TK, backend=self.backend)


def fused_activation(config: ModelConfig) -> Activation | None:
    """What the experts' kernels call the function between an expert's matrices; None if they do not know it."""
    is_plain = config.activation_func_clamp_value is None and not config.glu_linear_offset and not config.add_mlp_bias
    match (config.activation_func, config.gated_linear_unit):
        case ("silu", True) if is_plain:
            return "swiglu"
        case ("squared_relu", False) if is_plain:
            return "squared_relu"
        case _:
            return None


class Stacked(nn.Module):
    """One matrix an expert: weight [E, outputs, inputs]; with `bias`, one vector too: [E, outputs]."""

    def __init__(self, experts: int, outputs: int, inputs: int, backend: str, *, bias: bool) -> None:
        super().__init__()
        self.backend = backend
        self.products: ProductsName = "auto"
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))
        self.register_parameter("bias", nn.Parameter(torch.empty(experts, outputs)) if bias else None)

    def forward(self, x_RI: Tensor, ends_E: Tensor) -> Tensor:
        """Rows up to ends_E[0] through expert 0's matrix, those up to ends_E[1] through expert 1's: [R, outputs]."""
        return grouped_linear(x_RI, self.weight, ends_E, self.backend, self.products, self.bias)


class SharedExperts(nn.Module):
    """An MLP that every token passes, scaled by a sigmoid of the token where the model has `gate_weight`."""

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.config, self.backend = config, backend
        ffn = config.moe_shared_expert_intermediate_size or 0
        self.linear_fc1 = Linear(config.hidden_size, fc1_rows(config, ffn), bias=False)
        self.linear_fc2 = Linear(ffn, config.hidden_size, bias=False)
        weight = nn.Parameter(torch.empty(1, config.hidden_size)) if config.moe_shared_expert_gate else None
        self.register_parameter("gate_weight", weight)

    def forward(self, x_TH: Tensor) -> Tensor:
        out_TH = self.linear_fc2(hidden_units(self.linear_fc1(x_TH), self.config, self.backend))
        if self.gate_weight is None:
            return out_TH
        return torch.sigmoid(linear(x_TH, self.gate_weight)) * out_TH
