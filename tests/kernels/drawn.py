"""Cases of every kernel drawn at random: shapes of all sizes, ragged, empty and odd, for the oracles of the tests.

A draw is a case, the launch knobs where they decide which code runs, and the oracle that compares with fp64.
"""

# Shapes: T tokens, R rows, E experts, K top-k or the depth of a product, H hidden_size, F ffn width, N columns.

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ckptbridge.kernels.adam import adam_step
from ckptbridge.kernels.cross_entropy import CrossEntropyConfig, linear_cross_entropy, token_losses
from ckptbridge.kernels.embedding import embedding
from ckptbridge.kernels.experts import ProductsConfig, experts
from ckptbridge.kernels.gather import gather_rows, sum_rows
from ckptbridge.kernels.gradient_norm import gradient_norm
from ckptbridge.kernels.grouped_config import DEFAULT, GroupedConfig
from ckptbridge.kernels.grouped_gemm import grouped_matmul, grouped_weight_gradient
from ckptbridge.kernels.order import order_by_expert
from ckptbridge.kernels.rms_norm import rms_norm
from ckptbridge.kernels.rope import split_qkv
from ckptbridge.kernels.router_logits import router_logits
from ckptbridge.kernels.routing import route
from ckptbridge.kernels.swiglu import swiglu
from tests.kernels.cases import BF16, FP32, RmsNormCase, SwigluCase
from tests.kernels.cases_adam import AdamCase
from tests.kernels.cases_cross_entropy import CrossEntropyCase, TokenLossCase
from tests.kernels.cases_embedding import EmbeddingCase
from tests.kernels.cases_experts import ExpertsCase
from tests.kernels.cases_grouped import GroupedCase
from tests.kernels.cases_rope import SplitQkvCase
from tests.kernels.cases_routing import LogitsCase, OrderCase, RouteCase
from tests.kernels.oracle_adam import check_adam
from tests.kernels.oracle_cross_entropy import check_cross_entropy, check_token_losses
from tests.kernels.oracle_experts import MAIN_GRADIENTS, check_experts
from tests.kernels.oracle_grouped import check_matmul, check_weight_gradient
from tests.kernels.oracle_order import check_order
from tests.kernels.oracle_rms_norm import check_rms_norm
from tests.kernels.oracle_rope import check_split_qkv
from tests.kernels.oracle_routing import check_route, check_router_logits
from tests.kernels.oracle_swiglu import check_swiglu
from tests.kernels.test_embedding import check_embedding
from tests.kernels.test_gather import check_gather_rows, check_sum_rows
from tests.kernels.test_gradient_norm import check_gradient_norm

Draw = tuple[str, Callable[[torch.device], None]]
"""What was drawn, in words, and its check."""


class Dice:
    """Sizes for tests: as often small as large, and often at the border of a block or a step beside it."""

    def __init__(self, seed: int, largest: float) -> None:
        self.random, self.largest, self.seed = random.Random(seed), largest, seed

    def size(self, most: int, least: int = 1) -> int:
        """From `least` to `most` times the scale of the run."""
        most = max(least, int(most * self.largest))
        drawn = least + int((most - least + 1) ** self.random.random()) - 1
        if self.random.random() < 0.5:  # beside a power of two
            drawn = (1 << drawn.bit_length()) + self.random.choice((-1, 0, 1))
        return min(max(drawn, least), most)

    def width(self, most: int) -> int:
        """A size that half of the time is a multiple of 8, which whole 16-byte loads want in bf16."""
        drawn = self.size(most)
        return -(-drawn // 8) * 8 if self.random.random() < 0.5 else drawn

    def one_of(self, *values: Any) -> Any:
        return self.random.choice(values)

    def dtype(self) -> torch.dtype:
        return self.one_of(BF16, BF16, FP32)


def _rms_norm(dice: Dice) -> Draw:
    dtype = dice.dtype()
    case = RmsNormCase(
        R=dice.size(300, 0),
        H=dice.width(1500),
        dtype=dtype,
        weight_dtype=dice.one_of(dtype, FP32),
        has_residual=dice.one_of(True, False),
        eps=dice.one_of(1e-6, 1e-5, 1e-2),
        scale=dice.one_of(1e-2, 1.0, 30.0),
        aligned=dice.one_of(True, False),
    )
    return repr(case), partial(check_rms_norm, partial(rms_norm, backend="triton"), case, seed=dice.seed)


def _swiglu(dice: Dice) -> Draw:
    case = SwigluCase(R=dice.size(300, 0), F=dice.width(1500), dtype=dice.dtype(), aligned=dice.one_of(True, False))
    return repr(case), partial(check_swiglu, partial(swiglu, backend="triton"), case, seed=dice.seed)


def _split_qkv(dice: Dice) -> Draw:
    dtype, D = dice.dtype(), 2 * dice.size(100)
    case = SplitQkvCase(
        B=dice.size(4, 0),
        S=dice.size(40),
        G=dice.size(6),
        per_group=dice.size(9),
        D=D,
        R=dice.one_of(None, 2 * dice.random.randint(1, D // 2)),
        dtype=dtype,
        weight_dtype=dice.one_of(None, dtype, FP32),
    )
    return repr(case), partial(check_split_qkv, partial(split_qkv, backend="triton"), case, seed=dice.seed)


def _embedding(dice: Dice) -> Draw:
    V = dice.size(500)
    case = EmbeddingCase(
        T=dice.size(300, 0), V=V, H=dice.width(700), used=dice.one_of(None, dice.size(V)), dtype=dice.dtype()
    )
    if case.used is not None and case.used > V:
        case = replace(case, used=V)
    main = dice.one_of("", "new", "filled")
    return f"{case!r}, main {main!r}", partial(check_embedding, partial(embedding, backend="triton"), case, main=main)


def _token_losses(dice: Dice) -> Draw:
    case = TokenLossCase(
        C=dice.size(20, 0),
        V=dice.size(20_000),
        dtype=dice.dtype(),
        gap=dice.one_of(0, 0, dice.size(50)),
        scale=dice.one_of(0.1, 3.0, 60.0),
        divisor=dice.one_of(None, 7.0),
    )

    def operation(logits: torch.Tensor, targets: torch.Tensor, divisor: float | None) -> torch.Tensor:
        return token_losses(logits, targets, divisor, "triton", CrossEntropyConfig.from_shape(logits.shape[1]))

    return repr(case), partial(check_token_losses, operation, case, seed=dice.seed)


def _cross_entropy(dice: Dice) -> Draw:
    case = CrossEntropyCase(
        T=dice.size(120, 0),
        H=dice.width(200),
        V=dice.size(1500),
        chunk=dice.one_of(None, dice.size(64)),
        dtype=dice.dtype(),
    )
    main, gradient = dice.one_of(True, False), dice.one_of(1.0, -3.0, 0.01)
    operation = partial(linear_cross_entropy, backend="triton", chunk_tokens=case.chunk)
    check = partial(check_cross_entropy, operation, case, main=main, gradient=gradient, seed=dice.seed)
    return f"{case!r}, main {main}, gradient {gradient}", check


def _order(dice: Dice) -> Draw:
    E = dice.size(200)
    case = OrderCase(
        T=dice.size(1500, 0),
        E=E,
        K=min(E, dice.size(10)),
        spread=dice.one_of("even", "skewed", "one"),
        factor=dice.one_of(None, 0.5, 1.0, 1.25, 4.0),
        drop_policy=dice.one_of("probs", "position"),
        dtype=dice.one_of(torch.int32, torch.int64),
    )
    if case.factor is not None:
        case = replace(case, pads=dice.one_of(True, False))
    return repr(case), partial(check_order, partial(order_by_expert, backend="triton"), case, seed=dice.seed)


def _route(dice: Dice) -> Draw:
    E = dice.size(300)
    case = RouteCase(
        T=dice.size(300, 0),
        E=E,
        K=min(E, dice.size(12)),
        score_function=dice.one_of("softmax", "sigmoid"),
        pre_softmax=dice.one_of(True, False),
        scaling_factor=dice.one_of(None, 2.5),
        has_bias=dice.one_of(True, False),
        scale=dice.one_of(0.1, 2.0, 12.0),  # a sigmoid of -88 is nothing in fp32, and its gradient neither
    )
    return repr(case), partial(check_route, partial(route, backend="triton"), case, seed=dice.seed)


def _router_logits(dice: Dice) -> Draw:
    case = LogitsCase(T=dice.size(200, 0), H=dice.width(300), E=dice.size(200), has_bias=dice.one_of(True, False))
    return repr(case), partial(check_router_logits, partial(router_logits, backend="triton"), case, seed=dice.seed)


def _mixture(dice: Dice) -> ExpertsCase:
    E = dice.size(12)
    T, K = dice.size(80, 0), min(E, dice.size(5))
    case = ExpertsCase(
        T=T,
        K=K,
        E=E,
        H=dice.width(150),
        F=dice.width(150),
        spread=dice.one_of("ragged", "even", "empty", "one"),
        capacity=dice.one_of(None, dice.size(max(1, T * K))),
        unused=dice.one_of(0, dice.size(70)) if T else 0,  # rows are of tokens
        dtype=dice.dtype(),
        activation=dice.one_of("swiglu", "squared_relu"),
        aligned=dice.one_of(True, True, False),
    )
    return replace(case, is_padded=dice.one_of(True, False)) if case.capacity and T else case


def _experts(dice: Dice) -> Draw:
    case, main = _mixture(dice), dice.one_of(*MAIN_GRADIENTS)
    in_one_launch = case.dtype == BF16 and case.aligned and case.T > 0 and case.H % 8 == case.F % 8 == 0
    config = None
    if in_one_launch and dice.one_of(True, False):
        gathers = {"gathers_forward": dice.one_of(True, False), "gathers_gradient": dice.one_of(True, False)}
        config = ProductsConfig(matmul="triton", weight_gradient="triton", **gathers)

    def operation(x: Any, weights: Any, order: Any, fc1: Any, fc2: Any, activation: Any) -> torch.Tensor:
        return experts(x, weights, order, fc1, fc2, activation=activation, backend="triton", config=config)

    check = partial(check_experts, operation, case, main_gradient=main, seed=dice.seed)
    return f"{case!r}, {config}, main gradient {main}", check


def _rows(dice: Dice) -> Draw:
    case, weighted = _mixture(dice), dice.one_of(True, False)

    def check(device: torch.device) -> None:
        check_gather_rows(partial(gather_rows, backend="triton"), case, device)
        check_sum_rows(partial(sum_rows, backend="triton"), case, device, weighted=weighted)

    return f"{case!r}, weighted {weighted}", check


def _grouped(dice: Dice) -> tuple[GroupedCase, GroupedConfig]:
    counts = tuple(dice.one_of(0, dice.size(100), dice.size(100)) for _ in range(dice.size(9)))
    case = GroupedCase(
        counts=counts,
        K=dice.width(200),
        N=dice.width(200),
        unused=dice.one_of(0, dice.size(60)),
        tokens=24 + dice.size(40),
    )
    config = GroupedConfig(
        block_rows=dice.one_of(64, 128),
        block_columns=dice.one_of(64, 128),
        block_depth=dice.one_of(32, 64),
        num_warps=dice.one_of(4, 8),
        num_stages=dice.one_of(2, 3),
        group=dice.one_of(1, 2, 8),
        parts=dice.one_of(1, 2, 4),
        programs=dice.one_of(1, 2),
        flatten=dice.one_of(True, False),
        descriptors=dice.one_of(True, True, False),
    )
    return case, dice.one_of(config, config, DEFAULT)


def _matmul(dice: Dice) -> Draw:
    case, config = _grouped(dice)
    keywords = {"transposed": dice.one_of(True, False), "gathered": dice.one_of(True, False)}
    operation = partial(grouped_matmul, backend="triton", config=config)
    return f"{case!r}, {config}, {keywords}", partial(check_matmul, operation, case, seed=dice.seed, **keywords)


def _weight_gradient(dice: Dice) -> Draw:
    case, config = _grouped(dice)
    keywords = {name: dice.one_of(True, False) for name in ("accumulate", "d_gathered", "x_gathered")}
    squares = dice.one_of(True, False)
    operation = partial(grouped_weight_gradient, backend="triton", config=config, sums_squares=squares)
    check = partial(check_weight_gradient, operation, case, seed=dice.seed, **keywords)
    return f"{case!r}, {config}, {keywords}, squares {squares}", check


def _adam(dice: Dice) -> Draw:
    case = AdamCase(
        n=dice.size(20_000),
        weight=dice.one_of(None, BF16),
        moments=dice.one_of(FP32, BF16),
        step=dice.one_of(1, 3, 1000),
        coefficient=dice.one_of(None, 0.3, 1.0),
        weight_decay=dice.one_of(0.0, 0.1),
        first=dice.one_of(0, dice.size(10**6)),
        aligned=dice.one_of(True, False),
    )
    return repr(case), partial(check_adam, partial(adam_step, backend="triton"), case, seed=dice.seed)


def _gradient_norm(dice: Dice) -> Draw:
    sizes = tuple(dice.size(60_000) for _ in range(dice.size(5)))
    known = dice.random.randint(0, len(sizes))
    check = partial(check_gradient_norm, partial(gradient_norm, backend="triton"), sizes, seed=dice.seed, known=known)
    return f"sizes {sizes}, squares known of {known}", check


DRAWN: dict[str, Callable[[Dice], Draw]] = {
    "adam": _adam,
    "cross_entropy": _cross_entropy,
    "embedding": _embedding,
    "experts": _experts,
    "gather": _rows,
    "gradient_norm": _gradient_norm,
    "grouped_matmul": _matmul,
    "grouped_weight_gradient": _weight_gradient,
    "order": _order,
    "rms_norm": _rms_norm,
    "router_logits": _router_logits,
    "routing": _route,
    "split_qkv": _split_qkv,
    "swiglu": _swiglu,
    "token_losses": _token_losses,
}
"""A draw of every operation that has kernels."""


def drawn(operation: str, seed: int, largest: float = 1.0) -> Draw:
    """The case of a seed; the same on every machine. `largest` scales the largest sizes."""
    return DRAWN[operation](Dice(seed, largest))
