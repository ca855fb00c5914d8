"""A mixture of experts in place of an MLP, with or without a shared expert.

Shapes: T tokens, H hidden_size, F ffn width of an expert, E experts, K top-k, R = T*K routed rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.trainer.activations import activated, fc1_rows
from ckptbridge.trainer.dispatch import Order, combine, dispatch
from ckptbridge.trainer.grouped_linear import grouped_linear
from ckptbridge.trainer.router import Router, load_balancing_loss


@dataclass(frozen=True, slots=True)
class Balance:
    """How one layer's tokens were spread: choices per expert [E] and the load-balancing loss (1 is even)."""

    rows_E: Tensor
    loss: Tensor


class Mixture(nn.Module):
    """Router, routed experts and, where the model has one, a shared expert that sees every token."""

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.num_experts = config.num_moe_experts or 0
        self.router = Router(config)
        self.experts = Experts(config, backend)
        self.shared_experts = None
        if config.moe_shared_expert_intermediate_size:
            self.shared_experts = SharedExperts(config, backend)

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Balance]:
        """Output [T, H], and how the tokens were spread."""
        routing = self.router(x_TH)
        order = Order.of(routing.experts_TK, self.num_experts)
        rows_RH = self.experts(dispatch(x_TH, order), order.rows_E)
        out_TH = combine(rows_RH, routing.weights_TK, order)
        if self.shared_experts is not None:
            out_TH = out_TH + self.shared_experts(x_TH)
        return out_TH, Balance(order.rows_E, load_balancing_loss(routing.probabilities_TE, order.rows_E))


class Experts(nn.Module):
    """The routed experts; their matrices are stacked. (Megatron's module tree names the level twice.)"""

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.config, self.backend = config, backend
        experts, hidden, bias = config.num_moe_experts or 0, config.hidden_size, config.add_mlp_bias
        ffn = config.moe_ffn_hidden_size or 0
        self.experts = nn.ModuleDict(
            {
                "linear_fc1": Stacked(experts, fc1_rows(config, ffn), hidden, bias=bias),
                "linear_fc2": Stacked(experts, hidden, ffn, bias=bias),
            }
        )

    def forward(self, x_RH: Tensor, rows_E: Tensor) -> Tensor:
        hidden_RF = activated(self.experts["linear_fc1"](x_RH, rows_E), self.config, self.backend)
        return self.experts["linear_fc2"](hidden_RF, rows_E)


class Stacked(nn.Module):
    """One matrix an expert: weight [E, outputs, inputs]; with `bias`, one vector too: [E, outputs]."""

    def __init__(self, experts: int, outputs: int, inputs: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))
        self.register_parameter("bias", nn.Parameter(torch.empty(experts, outputs)) if bias else None)

    def forward(self, x_RI: Tensor, rows_E: Tensor) -> Tensor:
        """The first rows_E[0] rows through expert 0's matrix, the next rows_E[1] through expert 1's: [R, outputs]."""
        out_RO = grouped_linear(x_RI, self.weight, rows_E)
        if self.bias is None:
            return out_RO
        return out_RO + self.bias.repeat_interleave(rows_E, dim=0)


class SharedExperts(nn.Module):
    """An MLP that every token passes, scaled by a sigmoid of the token where the model has `gate_weight`."""

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.config, self.backend = config, backend
        ffn = config.moe_shared_expert_intermediate_size or 0
        self.linear_fc1 = nn.Linear(config.hidden_size, fc1_rows(config, ffn), bias=False)
        self.linear_fc2 = nn.Linear(ffn, config.hidden_size, bias=False)
        weight = nn.Parameter(torch.empty(1, config.hidden_size)) if config.moe_shared_expert_gate else None
        self.register_parameter("gate_weight", weight)

    def forward(self, x_TH: Tensor) -> Tensor:
        out_TH = self.linear_fc2(activated(self.linear_fc1(x_TH), self.config, self.backend))
        if self.gate_weight is None:
            return out_TH
        return torch.sigmoid(nn.functional.linear(x_TH, self.gate_weight)) * out_TH
