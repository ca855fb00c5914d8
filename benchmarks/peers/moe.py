"""A mixture layer, router and experts, in this package and in others: what `moe_layer.py` times.

Shapes: T tokens, H hidden_size, E experts, K top-k, F ffn width of an expert, R = T*K routed rows.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any

import torch
from slices import Slice
from torch import Tensor, nn
from torch.nn import functional

from ckptbridge.kernels.backend import Backend
from ckptbridge.kernels.experts import ProductsConfig, experts
from ckptbridge.kernels.main_gradient import MainGradient, set_main_gradient
from ckptbridge.kernels.order import order_by_expert
from ckptbridge.kernels.router_logits import router_logits
from ckptbridge.kernels.routing import route

PRODUCTS = {
    "torch": ProductsConfig(matmul="torch", weight_gradient="torch"),
    "triton": ProductsConfig(matmul="triton", weight_gradient="triton"),
    "mixed": ProductsConfig(matmul="triton", weight_gradient="torch"),
    "gathering-forward": ProductsConfig(matmul="triton", weight_gradient="triton", gathers_forward=True),
    "gathering": ProductsConfig(matmul="triton", weight_gradient="triton", gathers_forward=True, gathers_gradient=True),
    "reference": ProductsConfig(matmul="reference", weight_gradient="reference"),
    "quack": ProductsConfig(matmul="quack", weight_gradient="quack"),
    "transformer_engine": ProductsConfig(matmul="transformer_engine", weight_gradient="transformer_engine"),
}
"""Who computes the grouped products of ours; "mixed" leaves torch the weights' gradients."""


class Shape:
    """The sizes of a slice's mixture."""

    def __init__(self, slice_: Slice) -> None:
        config = slice_.config
        self.name, self.T, self.H = slice_.name, slice_.tokens, config.hidden_size
        self.E, self.K = config.num_moe_experts or 0, config.moe_router_topk
        self.F = config.moe_ffn_hidden_size or 0

    @property
    def flops(self) -> float:
        """Of a forward and backward pass: three times the products of every routed row; the router is not counted."""
        return 3.0 * 2 * self.T * self.K * 3 * self.H * self.F


class Ours(nn.Module):
    """The kernels of this package as the trainer calls them."""

    def __init__(self, shape: Shape, device: torch.device, products: ProductsConfig, backend: Backend) -> None:
        super().__init__()
        self.shape, self.products, self.backend = shape, products, backend
        self.router = nn.Parameter(_matrix(shape.E, shape.H, device=device))
        self.fc1 = nn.Parameter(_matrix(shape.E, 2 * shape.F, shape.H, device=device))
        self.fc2 = nn.Parameter(_matrix(shape.E, shape.H, shape.F, device=device))

    def forward(self, x_TH: Tensor) -> Tensor:
        logits_TE = router_logits(x_TH, self.router, backend=self.backend)
        routes = route(logits_TE, topk=self.shape.K, backend=self.backend)
        order = order_by_expert(routes.experts_TK, self.shape.E, backend=self.backend)
        return experts(x_TH, routes.weights_TK, order, self.fc1, self.fc2, backend=self.backend, config=self.products)

    def sum_gradients(self) -> None:
        """From now on gradients are added to fp32 sums, inside the products where these can."""
        for weight in self.parameters():
            main = MainGradient(torch.zeros_like(weight, dtype=torch.float32, requires_grad=False))
            main.is_filled = True
            set_main_gradient(weight, main)


class Plain(nn.Module):
    """What torch itself offers: sort, gather, grouped product, SwiGLU, grouped product, index_add."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        super().__init__()
        self.E, self.K = shape.E, shape.K
        self.router = nn.Parameter(_matrix(shape.E, shape.H, device=device))
        fc1, fc2 = (
            _matrix(shape.E, 2 * shape.F, shape.H, device=device),
            _matrix(shape.E, shape.H, shape.F, device=device),
        )
        self.fc1 = nn.Parameter(fc1.transpose(1, 2).contiguous())
        self.fc2 = nn.Parameter(fc2.transpose(1, 2).contiguous())

    def forward(self, x_TH: Tensor) -> Tensor:
        weights_TK, experts_TK = functional.linear(x_TH, self.router).float().topk(self.K, dim=-1)
        weights_TK, experts_R = weights_TK.softmax(-1), experts_TK.flatten()
        order_R = experts_R.argsort(stable=True)
        ends_E = torch.histc(experts_R.float(), self.E, 0, self.E - 1).cumsum(0).to(torch.int32)
        tokens_R = order_R // self.K
        gate_proj, up_proj = torch._grouped_mm(x_TH[tokens_R], self.fc1, offs=ends_E).chunk(2, -1)
        y_RH = torch._grouped_mm(functional.silu(gate_proj) * up_proj, self.fc2, offs=ends_E)
        y_RH = y_RH * weights_TK.flatten()[order_R].unsqueeze(-1).to(x_TH.dtype)
        return torch.zeros_like(x_TH).index_add_(0, tokens_R, y_RH)

    def sum_gradients(self) -> None:
        sum_behind_autograd(self)


def sonic(shape: Shape, device: torch.device) -> nn.Module:
    """SonicMoE's layer (0.1.2.post1 with quack 0.6.5), which returns new gradients in bf16."""
    _name_context_variables()
    from sonicmoe import MoE
    from sonicmoe.enums import ActivationType

    class Sonic(MoE):
        def forward(self, x_TH: Tensor) -> Tensor:
            out = super().forward(x_TH)
            return out[0] if isinstance(out, tuple) else out

        def sum_gradients(self) -> None:
            sum_behind_autograd(self)

    with torch.device(device):
        layer = Sonic(shape.E, shape.K, shape.H, shape.F, ActivationType.SWIGLU, False, 0.02)
    return layer.to(torch.bfloat16).train()


def _name_context_variables() -> None:
    """quack 0.6.5 refuses to name a context variable that CuTe DSL 4.8.1 holds, and with it every kernel."""
    import quack.gemm_runtime.identity as identity

    named: Callable[..., Any] = identity.semantic_value_key

    def key(value: Any, seen: Any) -> Any:
        is_descriptor = type(value).__module__ == "builtins" and type(value).__name__.endswith("descriptor")
        if isinstance(value, contextvars.ContextVar) or is_descriptor:
            return "opaque", repr(type(value)), getattr(value, "name", getattr(value, "__qualname__", ""))
        try:
            return named(value, seen)
        except TypeError:
            return "opaque", type(value).__module__, type(value).__qualname__

    identity.semantic_value_key = key


def sum_behind_autograd(layer: nn.Module) -> None:
    """Add each new gradient to an fp32 sum and drop it: what a trainer does with a layer that only returns them."""
    for weight in layer.parameters():
        total = torch.zeros_like(weight, dtype=torch.float32, requires_grad=False)

        def add(weight: Tensor, total: Tensor = total) -> None:
            total.add_(weight.grad)
            weight.grad = None

        weight.register_post_accumulate_grad_hook(add)


def set_router(layer: nn.Module, router_EH: Tensor) -> None:
    """Give every layer the same router, and so the same choices."""
    router = layer.router
    weight = router if isinstance(router, Tensor) else router.weight
    with torch.no_grad():
        weight.copy_(router_EH)


def _matrix(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02
