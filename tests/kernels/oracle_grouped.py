"""The oracles of the grouped products: every element against fp64, within derived bounds."""

# Shapes: R routed rows, T tokens, E experts, K the depth of a product, N its columns.

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ckptbridge.kernels.grouped_gemm import grouped_matmul, grouped_weight_gradient
from tests.kernels.cases import BF16, random_tensor
from tests.kernels.cases_grouped import GroupedCase
from tests.kernels.poison import poisoned_memory
from tests.kernels.tolerances import FP32, REDUCTION, assert_close

Matmul = Callable[..., Tensor]
WeightGradient = Callable[..., Tensor | None]

BEHIND = 2**30  # an index that nobody may follow


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows as an operation gets them, and as fp64 holds them: `wide` is NaN where nobody may read."""

    given: Tensor
    indices: Tensor | None
    wide: Tensor


def rows_of(case: GroupedCase, width: int, generator: torch.Generator, *, gathered: bool) -> Rows:
    """Random rows of bf16; those behind the last expert's are NaN, or their indices lead astray."""
    used = sum(case.counts)
    if not gathered:
        given = random_tensor((case.R, width), BF16, generator)
        given[used:] = torch.nan
        return Rows(given=given, indices=None, wide=given.double())
    given = random_tensor((case.tokens, width), BF16, generator)
    # -1 is a row of padding.
    indices = torch.randint(-1, case.tokens, (case.R,), dtype=torch.int32, generator=generator, device=given.device)
    wide = given.double()[indices.clamp(0)].masked_fill_((indices < 0)[:, None], 0)
    indices[used:] = BEHIND
    return Rows(given=given, indices=indices, wide=wide)


def ends_of(case: GroupedCase, device: torch.device) -> Tensor:
    return torch.tensor(case.counts, device=device).cumsum(0).int()


@poisoned_memory()
def check_matmul(
    operation: Matmul,
    case: GroupedCase,
    device: torch.device,
    *,
    transposed: bool = True,
    gathered: bool = False,
    seed: int = 0,
) -> None:
    """Run `operation` on a case; AssertionError names the first expert whose rows are off."""
    generator = torch.Generator(device).manual_seed(seed)
    a = rows_of(case, case.K, generator, gathered=gathered)
    shape = (case.N, case.K) if transposed else (case.K, case.N)
    weight = random_tensor((len(case.counts), *shape), BF16, generator)
    out = operation(a.given, weight, ends_of(case, device), transposed=transposed, rows_R=a.indices)
    assert out.shape == (case.R, case.N), f"out: shape {tuple(out.shape)}"
    assert out.dtype == BF16, f"out: {out.dtype}"
    for expert, rows in enumerate(case.experts):
        b = weight[expert].double()
        _assert_product(f"rows of expert {expert}", out[rows], a.wide[rows], b.t() if transposed else b)


@poisoned_memory()
def check_weight_gradient(
    operation: WeightGradient,
    case: GroupedCase,
    device: torch.device,
    *,
    accumulate: bool = False,
    d_gathered: bool = False,
    x_gathered: bool = False,
    dtype: torch.dtype = torch.float32,
    roundings: int = 1,
    seed: int = 0,
) -> None:
    """Run `operation` on a case; AssertionError names the first expert whose gradient is off, or the squares."""
    generator = torch.Generator(device).manual_seed(seed)
    d = rows_of(case, case.N, generator, gathered=d_gathered)
    x = rows_of(case, case.K, generator, gathered=x_gathered)
    out = random_tensor((len(case.counts), case.N, case.K), dtype, generator, scale=4.0)
    before = out.clone()
    if not accumulate:
        out.fill_(torch.nan)
    squares = operation(
        d.given,
        x.given,
        ends_of(case, device),
        out,
        accumulate=accumulate,
        d_rows_R=d.indices,
        x_rows_R=x.indices,
    )
    for expert, rows in enumerate(case.experts):
        earlier = before[expert].double() if accumulate else None
        _assert_product(f"gradient of expert {expert}", out[expert], d.wide[rows].t(), x.wide[rows], earlier, roundings)
    if squares is not None:
        assert not accumulate, "squares: of a gradient that was added to"
        assert dtype == torch.float32, "squares: of a gradient before it was rounded"
        expected = out.double().square().sum().item()
        # Positive terms in fp32, added in rows of a tile, tile after tile: some hundreds one after the other.
        assert abs(squares.double().sum().item() - expected) <= 512 * 2.0**-24 * expected, "squares: not those of out"


class Captured:
    """Both products of some operands, and a CUDA graph of them that is replayed with other ends.

    All cases have the widths and the number of experts of the first, and as many rows.
    """

    def __init__(self, case: GroupedCase, device: torch.device, **keywords: Any) -> None:
        """`keywords` go to both products: the backend, the config."""
        E = len(case.counts)
        self.a, self.d = (torch.randn(case.R, width, device=device).bfloat16() for width in (case.K, case.N))
        self.weight = torch.randn(E, case.N, case.K, device=device).bfloat16()
        self.ends_E = torch.zeros(E, dtype=torch.int32, device=device)
        self.gradient = torch.empty(E, case.N, case.K, device=device)
        self.keywords = keywords

    def run(self) -> Tensor:
        grouped_weight_gradient(self.d, self.a, self.ends_E, self.gradient, accumulate=False, **self.keywords)
        return grouped_matmul(self.a, self.weight, self.ends_E, transposed=True, **self.keywords)

    def check(self, cases: Sequence[GroupedCase]) -> None:
        """One graph, any routing: nothing about the rows of an expert is baked in."""
        self.run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self.run()
        for case in cases:
            self.ends_E.copy_(torch.tensor(case.counts).cumsum(0))
            graph.replay()
            for expert, rows in enumerate(case.experts):
                a, d = self.a[rows], self.d[rows].float()
                torch.testing.assert_close(out[rows], a @ self.weight[expert].t(), rtol=2e-2, atol=2e-2)
                torch.testing.assert_close(self.gradient[expert], d.t() @ a.float(), rtol=1e-3, atol=1e-3)


def _assert_product(
    name: str, actual: Tensor, a: Tensor, b: Tensor, earlier: Tensor | None = None, roundings: int = 1
) -> None:
    """actual = a @ b (+ earlier), rounded once; a and b are in fp64.

    A sum of K products is on the way as large as the root of the sum of their squares. A tensor core adds 16 products
    at a time and cuts off behind the last bit it keeps, one unit of that size each time; plain fp32 adds one product at
    a time and rounds to either side.
    """
    depth = a.shape[1]
    size = (a.square() @ b.square()).sqrt()
    noise = 2 * FP32 * REDUCTION * (1 + max(depth / 16, math.sqrt(depth))) * size
    expected = a @ b
    if earlier is not None:
        expected = expected + earlier
        noise = noise + 2 * FP32 * earlier.abs()
    assert_close(name, actual, expected, roundings=roundings, noise=noise)
