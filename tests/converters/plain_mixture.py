"""A SwiGLU MLP and a mixture of them in plain torch, in fp64: the oracle of what an upcycled layer computes.

Shapes: T tokens, H hidden_size, F width, N experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ckptbridge.converters.tensors import InMemory, LazyTensor
from ckptbridge.converters.upcycling.measured import MlpSample
from ckptbridge.converters.upcycling.neurons import DenseMlp


def random_mlp(hidden: int = 64, width: int = 192, std: float = 0.15, dtype: torch.dtype = torch.float32) -> DenseMlp:
    """A SwiGLU of random weights, its pre-activations about one, as behind an RMSNorm."""
    generator = torch.Generator().manual_seed(11)
    fc1 = torch.randn(2 * width, hidden, generator=generator) * std
    fc2 = torch.randn(hidden, width, generator=generator) * std
    return DenseMlp(0, InMemory(fc1.to(dtype)), InMemory(fc2.to(dtype)), width, True)


def hidden_TF(fc1: Tensor, x_TH: Tensor) -> Tensor:
    gate_proj, up_proj = fc1.double().chunk(2)
    return F.silu(x_TH.double() @ gate_proj.T) * (x_TH.double() @ up_proj.T)


def swiglu_TH(fc1: Tensor, fc2: Tensor, x_TH: Tensor) -> Tensor:
    return hidden_TF(fc1, x_TH) @ fc2.double().T


def sample_of(mlp: DenseMlp, x_TH: Tensor) -> MlpSample:
    hidden = hidden_TF(mlp.fc1.read(), x_TH)
    output = hidden @ mlp.fc2.read().double().T
    return MlpSample(layer=mlp.layer, input_TH=x_TH.float(), hidden_TF=hidden.float(), output_TH=output.float())


@dataclass(frozen=True)
class Layer:
    """The matrices of one layer's mixture, as Megatron-Core packs them."""

    router: Tensor
    experts: list[tuple[Tensor, Tensor]]
    shared: tuple[Tensor, Tensor] | None

    @staticmethod
    def of(tensors: Mapping[str, LazyTensor], layer: int) -> Layer:
        head = f"decoder.layers.{layer}.mlp"
        router = tensors[f"{head}.router.weight"].read()
        stems = [f"{head}.experts.experts.{e}" for e in range(len(router))]
        pairs = [(tensors[f"{s}.linear_fc1.weight"].read(), tensors[f"{s}.linear_fc2.weight"].read()) for s in stems]
        stem = f"{head}.shared_experts"
        shared = None
        if f"{stem}.linear_fc1.weight" in tensors:
            shared = (tensors[f"{stem}.linear_fc1.weight"].read(), tensors[f"{stem}.linear_fc2.weight"].read())
        return Layer(router, pairs, shared)

    def output_TH(self, x_TH: Tensor, topk: int, kind: str = "renormalised", shared_factor: float = 1.0) -> Tensor:
        """The mixture's output; a shared expert behind a sigmoid of zeros has the factor 0.5."""
        logits_TN = x_TH.double() @ self.router.double().T
        scores_TN = logits_TN.sigmoid() if kind == "sigmoid" else logits_TN.softmax(-1)
        weights_TK, experts_TK = scores_TN.topk(topk, -1)
        if kind != "pre-softmax":
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        weights_TN = torch.zeros_like(scores_TN).scatter(-1, experts_TK, weights_TK)
        out_TH = torch.zeros(len(x_TH), self.experts[0][1].shape[0], dtype=torch.float64)
        for number, (fc1, fc2) in enumerate(self.experts):
            out_TH += weights_TN[:, number, None] * swiglu_TH(fc1, fc2, x_TH)
        return out_TH if self.shared is None else out_TH + shared_factor * swiglu_TH(*self.shared, x_TH)


def relative(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference, as a share of what was expected."""
    return float((found - expected).norm() / expected.norm())
