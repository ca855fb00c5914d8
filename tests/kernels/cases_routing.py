"""The shapes of routing that tests and benchmarks share: those of real models, and awkward ones."""

# Shapes: T tokens, E experts, K top-k.

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

T = 16384  # tokens of a training step on one GPU

Spread = Literal["even", "skewed", "one"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderCase:
    """Choices [T, K] among E experts: drawn evenly, with one expert at 4 times the mean, or all on one expert first.

    With `factor`, experts have a capacity.
    """

    T: int
    E: int
    K: int
    model: str = ""
    spread: Spread = "even"
    factor: float | None = None
    drop_policy: Literal["probs", "position"] = "probs"
    pads: bool = False
    dtype: torch.dtype = torch.int32

    def __str__(self) -> str:
        capacity = "" if self.factor is None else f"-{self.drop_policy}-{self.factor}{'-padded' if self.pads else ''}"
        return f"{self.model or 'small'}-{self.T}x{self.K}of{self.E}-{self.spread}{capacity}"


REAL_ORDER = [
    OrderCase(T=T, E=8, K=2, model="llama3-e8t2"),
    OrderCase(T=T, E=64, K=8, model="qwen2-57b-a14b"),
    OrderCase(T=T, E=128, K=8, model="qwen3-30b-a3b"),
    OrderCase(T=T, E=128, K=8, model="qwen3-30b-a3b", spread="skewed"),
    OrderCase(T=T, E=8, K=2, model="llama3-e8t2", factor=1.0, spread="skewed"),
    OrderCase(T=T, E=8, K=2, model="llama3-e8t2", factor=4.0, drop_policy="position"),
    OrderCase(T=T, E=128, K=8, model="qwen3-30b-a3b", factor=1.0, spread="skewed", pads=True),
    OrderCase(T=T, E=256, K=8, model="deepseek-v3"),
    OrderCase(T=2**17, E=1024, K=8, model="largest"),
]

# No token, one token, one expert, experts that are no power of two, experts that nobody chose, one that all chose, more
# choices than one program counts and than all look at in one turn, every choice kept, hardly any kept.
_SHAPES = [(0, 4, 2), (1, 4, 2), (5, 1, 1), (37, 6, 2), (130, 60, 4), (43, 128, 8), (65, 3, 3), (9, 1024, 10)]
SMALL_ORDER = [
    *(OrderCase(T=t, E=e, K=k) for t, e, k in _SHAPES),
    OrderCase(T=37, E=6, K=2, dtype=torch.int64),
    OrderCase(T=200, E=8, K=2, spread="one"),
    OrderCase(T=3000, E=8, K=8),
    OrderCase(T=17000, E=8, K=2, spread="skewed"),
    *(
        OrderCase(T=t, E=e, K=k, spread=spread, factor=factor, drop_policy=policy, pads=pads)
        for t, e, k, spread, factor in [
            (37, 6, 2, "even", 1.0),
            (200, 8, 2, "one", 1.0),
            (129, 8, 2, "skewed", 1.25),
            (50, 60, 4, "even", 1.0),
            (11, 4, 2, "even", 4.0),
            (40, 8, 2, "one", 0.01),
            (0, 4, 2, "even", 1.0),
        ]
        for policy in ("probs", "position")
        for pads in (False, True)
    ),
    OrderCase(T=2500, E=4, K=2, spread="one", factor=1.5),
]


def random_choices(case: OrderCase, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Distinct experts of each token [T, K] and their weights, of which many are equal."""
    generator = torch.Generator().manual_seed(seed)
    scores_TE = torch.randn(case.T, case.E, generator=generator)
    if case.spread == "one":
        scores_TE[:, case.E // 2] += 100
    elif case.spread == "skewed":
        # A share of the tokens takes expert 1 whatever else it draws, so that it meets 4 times the mean.
        share = min(1.0, 4 * case.K / case.E)
        scores_TE[: int(share * case.T), min(1, case.E - 1)] += 100
    experts_TK = scores_TE.topk(case.K, dim=-1).indices if case.T else torch.empty(0, case.K, dtype=torch.int64)
    weights_TK = torch.randint(1, 40, (case.T, case.K), generator=generator) / 64
    return experts_TK.to(case.dtype).to(device), weights_TK.to(device)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteCase:
    """logits [T, E], of which each token chooses K experts."""

    T: int
    E: int
    K: int
    model: str = ""
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    pre_softmax: bool = False
    scaling_factor: float | None = None
    has_bias: bool = False
    scale: float = 2.0  # of the logits

    def __str__(self) -> str:
        weights = f"{self.score_function}{'-pre' if self.pre_softmax else ''}{'-bias' if self.has_bias else ''}"
        return f"{self.model or 'small'}-{self.T}x{self.K}of{self.E}-{weights}-{self.scale:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsCase:
    """x [T, H] in bf16, weight [E, H]."""

    T: int
    H: int
    E: int
    model: str = ""
    has_bias: bool = False

    def __str__(self) -> str:
        return f"{self.model or 'small'}-{self.T}x{self.H}-{self.E}{'-bias' if self.has_bias else ''}"


REAL_ROUTE = [
    RouteCase(T=T, E=8, K=2, model="llama3-e8t2"),
    RouteCase(T=T, E=64, K=8, model="qwen2-57b-a14b", pre_softmax=True),
    RouteCase(T=T, E=128, K=8, model="qwen3-30b-a3b"),
    RouteCase(T=T, E=256, K=8, model="deepseek-v3", score_function="sigmoid", has_bias=True, scaling_factor=2.5),
    RouteCase(T=T, E=512, K=10, model="qwen3-next-80b-a3b"),
]

# No token, one token, one expert, every expert chosen, experts that are no power of two, more tiles than programs, and
# logits whose exp is infinite in fp32, experts of next to no score that a bias chose.
SMALL_ROUTE = [
    *(RouteCase(T=t, E=e, K=k) for t, e, k in [(0, 4, 2), (1, 8, 2), (5, 1, 1), (9, 8, 8), (37, 6, 2), (70, 128, 8)]),
    RouteCase(T=1100, E=8, K=2),
    RouteCase(T=7, E=1000, K=10),
    RouteCase(T=33, E=60, K=4, pre_softmax=True),
    RouteCase(T=33, E=60, K=4, scale=200.0),
    RouteCase(T=33, E=60, K=4, pre_softmax=True, scaling_factor=16.0, has_bias=True),
    *(
        RouteCase(T=45, E=24, K=3, score_function="sigmoid", pre_softmax=pre, has_bias=bias, scaling_factor=2.5)
        for pre in (False, True)
        for bias in (False, True)
    ),
    RouteCase(T=45, E=24, K=3, score_function="sigmoid", scale=60.0),
    RouteCase(T=22, E=113, K=1, has_bias=True, scale=12.0),
]
REAL_LOGITS = [
    LogitsCase(T=T, H=4096, E=8, model="llama3-e8t2"),
    LogitsCase(T=T, H=3584, E=64, model="qwen2-57b-a14b"),
    LogitsCase(T=T, H=2048, E=128, model="qwen3-30b-a3b"),
    LogitsCase(T=T, H=2880, E=32, model="gpt-oss-20b", has_bias=True),
]
SMALL_LOGITS = [LogitsCase(T=t, H=h, E=e) for t, h, e in [(0, 64, 4), (1, 64, 8), (37, 96, 6), (130, 48, 60)]]
SMALL_LOGITS.append(LogitsCase(T=65, H=72, E=32, has_bias=True))
