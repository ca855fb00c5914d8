"""Mixtures of experts that tests and benchmarks share: shapes, ways to spread the tokens, and orders of their rows."""

# Shapes: T tokens, K top-k, R routed rows, E experts, H hidden_size, F ffn width of an expert.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ckptbridge.kernels.order import Order
from tests.kernels.cases import BF16, FP32, T


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsCase:
    """x [T, H], fc1 [E, 2F or F, H], fc2 [E, H, F]; each token makes K choices."""

    T: int
    K: int
    E: int
    H: int
    F: int
    spread: str = "ragged"  # ragged, even, empty (every third expert meets nobody), one (takes all)
    capacity: int | None = None  # an expert's choices beyond it are dropped
    is_padded: bool = False  # to the capacity, with rows that are no token's
    unused: int = 0  # rows behind the last expert's, which hold garbage
    dtype: torch.dtype = BF16
    activation: str = "swiglu"
    model: str = ""
    aligned: bool = True  # to 16 bytes

    def __str__(self) -> str:
        dtype = {BF16: "bf16", FP32: "fp32"}[self.dtype]
        drops = "" if self.capacity is None else f"-{'padded' if self.is_padded else 'dropped'}-{self.capacity}"
        shape = f"{self.T}x{self.K}of{self.E}-{self.H}x{self.F}"
        return f"{self.model or 'small'}-{shape}-{self.spread}{drops}-{self.activation}-{dtype}"


# Small enough for Triton's interpreter, and chosen for what can go wrong: no token, one, experts without rows, one with
# all of them, dropped choices, rows of padding, unused rows, one column, widths that are no multiple of 16 bytes or of
# a block, more rows than a tile, addresses that no 16-byte load may touch.
SMALL_EXPERTS = [
    ExpertsCase(T=33, K=3, E=5, H=72, F=40),
    ExpertsCase(T=33, K=3, E=5, H=72, F=40, activation="squared_relu"),
    ExpertsCase(T=29, K=2, E=7, H=64, F=96, spread="empty", dtype=FP32),
    ExpertsCase(T=29, K=2, E=7, H=33, F=21, spread="empty", dtype=FP32, activation="squared_relu"),
    ExpertsCase(T=70, K=4, E=6, H=40, F=24, spread="one"),
    ExpertsCase(T=40, K=2, E=4, H=130, F=66, capacity=11),
    ExpertsCase(T=40, K=2, E=4, H=24, F=16, capacity=11, is_padded=True),
    ExpertsCase(T=40, K=2, E=4, H=24, F=16, capacity=33, is_padded=True, dtype=FP32),
    ExpertsCase(T=31, K=3, E=6, H=40, F=72, unused=9, capacity=12),
    ExpertsCase(T=31, K=3, E=6, H=40, F=72, unused=70, dtype=FP32),
    ExpertsCase(T=1, K=1, E=3, H=1, F=1, dtype=FP32),
    ExpertsCase(T=0, K=2, E=3, H=16, F=8),
    ExpertsCase(T=21, K=2, E=3, H=130, F=33, aligned=False),
]
# An MoE layer of models that are trained here. fc1 and fc2 of the first two are compared in 5 GiB of fp64 at a time.
REAL_EXPERTS = [
    ExpertsCase(T=4096, K=2, E=8, H=4096, F=14336, model="llama3-e8t2"),
    ExpertsCase(T=T, K=8, E=64, H=3584, F=2560, model="qwen2-57b-a14b"),
    ExpertsCase(T=T, K=8, E=128, H=2048, F=768, model="qwen3-30b-a3b"),
    ExpertsCase(T=T, K=8, E=128, H=2048, F=768, spread="one", model="qwen3-30b-a3b"),
    ExpertsCase(T=T, K=8, E=128, H=2048, F=768, capacity=1024, unused=300, model="qwen3-30b-a3b"),
    ExpertsCase(T=T, K=8, E=128, H=2048, F=768, capacity=1280, is_padded=True, model="qwen3-30b-a3b"),
]


def random_choices(case: ExpertsCase, generator: torch.Generator) -> Tensor:
    """The experts of each token [T, K], on the CPU. One expert may be chosen twice where it takes all."""
    if case.spread == "one":
        return torch.full((case.T, case.K), case.E // 2)
    scores_TE = torch.rand(case.T, case.E, generator=generator)
    if case.spread == "ragged":
        scores_TE += 0.5 * torch.rand(case.E, generator=generator)
    if case.spread == "empty":
        scores_TE[:, ::3] = -1
    return scores_TE.topk(case.K, dim=-1).indices


def order_of(case: ExpertsCase, experts_TK: Tensor, device: torch.device) -> Order:
    """The order of a case's rows, choice by choice in plain Python: tokens of an expert stand in their own order."""
    chosen: list[list[tuple[int, int]]] = [[] for _ in range(case.E)]
    for token, row in enumerate(experts_TK.tolist()):
        for k, expert in enumerate(row):
            if case.capacity is None or len(chosen[expert]) < case.capacity:
                chosen[expert].append((token, k))
    tokens, ends = [], []
    rows_TK = torch.full((case.T, case.K), -1, dtype=torch.int32)
    for choices in chosen:
        for token, k in choices:
            rows_TK[token, k] = len(tokens)
            tokens.append(token)
        if case.is_padded:
            tokens += [-1] * ((case.capacity or 0) - len(choices))
        ends.append(len(tokens))
    tokens += [(2**31 - 1, -7, 0)[i % 3] for i in range(case.unused)]  # nobody may follow these
    tokens_R = torch.tensor(tokens, dtype=torch.int32, device=device)
    return Order(tokens_R, rows_TK.to(device), torch.tensor(ends, dtype=torch.int32, device=device))
