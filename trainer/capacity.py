"""How many rows an expert of a mixture may have, and the order of the rows under that limit."""

from __future__ import annotations

from dataclasses import dataclass

from ckptbridge.kernels.backend import Backend
from ckptbridge.kernels.order import DropPolicy, Order, expert_capacity, order_by_expert
from ckptbridge.kernels.routing import Routes


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """The limit, by the names of Megatron-Core: moe_expert_capacity_factor, moe_token_drop_policy and
    moe_pad_expert_input_to_capacity. Without a factor nothing is dropped."""

    factor: float | None = None
    drop_policy: DropPolicy = "probs"
    pads: bool = False

    def order(self, routes: Routes, backend: Backend) -> Order:
        """The rows of one layer's tokens, sorted by expert."""
        experts_TK, num_experts = routes.experts_TK, len(routes.choices_E)
        if self.factor is None:
            return order_by_expert(experts_TK, num_experts, backend=backend)
        return order_by_expert(
            experts_TK,
            num_experts,
            capacity=expert_capacity(*experts_TK.shape, num_experts, self.factor),
            drop_policy=self.drop_policy,
            pad_to_capacity=self.pads,
            weights_TK=routes.weights_TK,
            backend=backend,
        )
