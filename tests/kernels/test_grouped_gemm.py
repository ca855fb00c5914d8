"""Grouped products: every backend against fp64, the launch knobs, and oracles that see planted faults."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from ckptbridge.kernels.grouped_config import DEFAULT, GroupedConfig, Product, config_for
from ckptbridge.kernels.grouped_gemm import grouped_matmul, grouped_weight_gradient
from tests.kernels.cases_grouped import REAL, SMALL, GroupedCase, ragged_to_capture
from tests.kernels.oracle_grouped import Captured, check_matmul, check_weight_gradient

ON_GPU = torch.cuda.is_available()
TILES = GroupedConfig(block_rows=64, block_columns=64, block_depth=32, num_warps=4, group=2, parts=2)
# What a GPU's tensor cores take for a tile is at least 64 high; the interpreter takes smaller ones, for more tiles.
SMALL_TILES = TILES if ON_GPU else replace(TILES, block_rows=32)
RAGGED = SMALL[2]
# Knobs that change which code runs. Warp specialisation is for GPUs alone.
KNOBS = {
    "one part": replace(SMALL_TILES, parts=1),
    "four parts": replace(SMALL_TILES, parts=4),
    "without descriptors": replace(SMALL_TILES, descriptors=False),
    "unflattened": replace(SMALL_TILES, flatten=False),
    "two programs": replace(SMALL_TILES, programs=2),
    "default": DEFAULT,
}


def matmul_of(config: GroupedConfig | None = None, **keywords):
    return partial(grouped_matmul, backend="triton", config=config, **keywords)


def gradient_of(config: GroupedConfig | None = None, **keywords):
    return partial(grouped_weight_gradient, backend="triton", config=config, **keywords)


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_matmul_equals_fp64(case, transposed, gathered, device):
    check_matmul(grouped_matmul, case, device, transposed=transposed, gathered=gathered)
    check_matmul(matmul_of(SMALL_TILES), case, device, transposed=transposed, gathered=gathered)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("gathered", [(False, False), (True, False), (False, True)], ids=["plain", "d", "x"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_weight_gradient_equals_fp64(case, gathered, accumulate, device):
    keywords = {"accumulate": accumulate, "d_gathered": gathered[0], "x_gathered": gathered[1]}
    check_weight_gradient(grouped_weight_gradient, case, device, **keywords)
    check_weight_gradient(gradient_of(SMALL_TILES), case, device, **keywords)
    check_weight_gradient(gradient_of(SMALL_TILES, sums_squares=True), case, device, **keywords)


@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS.keys())
def test_launch_knobs_give_the_same_numbers(knobs, device):
    check_matmul(matmul_of(knobs), RAGGED, device)
    check_weight_gradient(gradient_of(knobs, sums_squares=True), RAGGED, device)
    check_weight_gradient(gradient_of(knobs), RAGGED, device, accumulate=True)


@pytest.mark.parametrize("case", REAL if ON_GPU else [], ids=str)
@pytest.mark.parametrize("gathered", [False, True])
def test_real_shapes_equal_fp64(case, gathered, device):
    check_matmul(matmul_of(), case, device, gathered=gathered)
    if not gathered:
        check_matmul(matmul_of(), case, device, transposed=False)
    for accumulate in (False, True):
        operation = gradient_of(sums_squares=True)
        check_weight_gradient(operation, case, device, accumulate=accumulate, x_gathered=gathered)


def test_gradient_in_bf16(device):
    for backend in ("reference", "torch", "triton"):
        operation = partial(grouped_weight_gradient, backend=backend)
        check_weight_gradient(operation, SMALL[4], device, dtype=torch.bfloat16)


@pytest.mark.parametrize("gathered", [False, True])
def test_torch_backend_equals_fp64(gathered, device):
    case = GroupedCase(counts=(5, 0, 64, 1, 33), K=72, N=136, unused=9)
    check_matmul(partial(grouped_matmul, backend="torch"), case, device, gathered=gathered)
    check_matmul(partial(grouped_matmul, backend="torch"), case, device, transposed=False)


def test_repeated_rows_and_two_gathers(device):
    check_weight_gradient(gradient_of(SMALL_TILES), RAGGED, device, d_gathered=True, x_gathered=True)


def test_same_numbers_in_every_run(device):
    generator = torch.Generator(device).manual_seed(0)
    d, x = (torch.randn(200, 64, device=device, generator=generator).bfloat16() for _ in range(2))
    ends_E = torch.tensor([90, 200], device=device, dtype=torch.int32)
    gradients = [torch.zeros(2, 64, 64, device=device) for _ in range(2)]
    for gradient in gradients:
        for _ in range(3):
            grouped_weight_gradient(d, x, ends_E, gradient, accumulate=True, backend="triton", config=SMALL_TILES)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("step", range(1 if ON_GPU else 0))
def test_captured_in_a_graph_it_follows_the_ends(step, device):
    cases = ragged_to_capture(rows=100)
    Captured(cases[0], device, backend="triton").check(cases)


# Planted faults: each computes something else than the definition, and the oracle must say so.


def _moved(ends_E, *, expert: int, by: int):
    ends_E = ends_E.clone()
    ends_E[expert] += by
    return ends_E


def _last_row_with_the_next_experts_weight(a, weight, ends_E, **keywords):
    return grouped_matmul(a, weight, _moved(ends_E, expert=2, by=-1), **keywords)


def _neighbours_row_in_the_last_tile(a, weight, ends_E, **keywords):
    return grouped_matmul(a, weight, _moved(ends_E, expert=2, by=1), **keywords)


def _rows_of_the_last_tile_dropped(a, weight, ends_E, **keywords):
    out = grouped_matmul(a, weight, ends_E, **keywords)
    out[int(ends_E[-1]) - 1] = torch.nan
    return out


def _weight_transposed(a, weight, ends_E, *, transposed, **keywords):
    return grouped_matmul(a, weight, ends_E, transposed=not transposed, **keywords)


def _depth_cut_off(a, weight, ends_E, **keywords):
    a = a.clone()
    a[:, -1] = 0
    return grouped_matmul(a, weight, ends_E, **keywords)


def _padding_read_as_the_first_token(a, weight, ends_E, *, rows_R, **keywords):
    return grouped_matmul(a, weight, ends_E, rows_R=rows_R.clamp(0), **keywords)


def _column_shifted(a, weight, ends_E, **keywords):
    return grouped_matmul(a, weight, ends_E, **keywords).roll(1, -1)


def _summed_in_bf16(a, weight, ends_E, **keywords):
    halves = [(slice(None, 30), slice(30, None)), (slice(30, None), slice(None, 30))]
    parts = []
    for _, zeroed in halves:
        part = a.clone()
        part[:, zeroed] = 0
        parts.append(grouped_matmul(part, weight, ends_E, **keywords))
    return parts[0] + parts[1]


SQUARE = GroupedCase(counts=(5, 0, 64, 1, 0, 0, 33), K=72, N=72, unused=9)


@pytest.mark.parametrize(
    ("fault", "gathered"),
    [
        (_last_row_with_the_next_experts_weight, False),
        (_neighbours_row_in_the_last_tile, False),
        (_rows_of_the_last_tile_dropped, False),
        (_weight_transposed, False),
        (_depth_cut_off, False),
        (_column_shifted, True),
        (_padding_read_as_the_first_token, True),
        (_summed_in_bf16, False),
    ],
)
def test_matmul_oracle_catches(fault, gathered, device):
    check_matmul(grouped_matmul, SQUARE, device, gathered=gathered)
    with pytest.raises(AssertionError, match="rows of expert"):
        check_matmul(fault, SQUARE, device, gathered=gathered)


def _neighbours_row_in_the_last_chunk(d, x, ends_E, out, **keywords):
    grouped_weight_gradient(d, x, _moved(ends_E, expert=2, by=1), out, **keywords)


def _garbage_read(d, x, ends_E, out, **keywords):
    grouped_weight_gradient(d, x, _moved(ends_E, expert=-1, by=1), out, **keywords)


def _last_row_dropped(d, x, ends_E, out, **keywords):
    grouped_weight_gradient(d, x, _moved(ends_E, expert=-1, by=-1), out, **keywords)


def _accumulate_ignored(d, x, ends_E, out, *, accumulate, **keywords):
    grouped_weight_gradient(d, x, ends_E, out, accumulate=False, **keywords)


def _added_twice(d, x, ends_E, out, *, accumulate, **keywords):
    for _ in range(2):
        grouped_weight_gradient(d, x, ends_E, out, accumulate=accumulate, **keywords)


def _expert_without_rows_left_out(d, x, ends_E, out, **keywords):
    before = out[1].clone()
    grouped_weight_gradient(d, x, ends_E, out, **keywords)
    out[1] = before


def _rounded_to_bf16(d, x, ends_E, out, **keywords):
    grouped_weight_gradient(d, x, ends_E, out, **keywords)
    out.copy_(out.bfloat16())


def _squares_of_all_programs_but_one(d, x, ends_E, out, **keywords):
    return gradient_of(SMALL_TILES, sums_squares=True)(d, x, ends_E, out, **keywords)[1:]


def _squares_before_the_addition(d, x, ends_E, out, *, accumulate, **keywords):
    operation = gradient_of(SMALL_TILES, sums_squares=True)
    squares = operation(d, x, ends_E, torch.empty_like(out), accumulate=False, **keywords)
    grouped_weight_gradient(d, x, ends_E, out, accumulate=accumulate, **keywords)
    return squares


def test_squares_are_known_of_what_is_written_in_fp32_alone(device):
    d, x = (torch.randn(40, width, device=device).bfloat16() for width in (24, 16))
    ends_E = torch.tensor([10, 10, 40], dtype=torch.int32, device=device)
    out = torch.zeros(3, 24, 16, device=device)
    for backend in ("reference", "triton"):
        operation = partial(grouped_weight_gradient, d, x, ends_E, sums_squares=True, backend=backend)
        assert (operation(out, accumulate=False) is not None) == (backend == "triton")
        assert operation(out, accumulate=True) is None
        assert operation(out.bfloat16(), accumulate=False) is None


@pytest.mark.parametrize(
    ("fault", "accumulate"), [(_squares_of_all_programs_but_one, False), (_squares_before_the_addition, True)]
)
def test_oracle_catches_wrong_squares(fault, accumulate, device):
    with pytest.raises(AssertionError, match="squares: "):
        check_weight_gradient(fault, RAGGED, device, accumulate=accumulate)


@pytest.mark.parametrize(
    ("fault", "accumulate"),
    [
        (_neighbours_row_in_the_last_chunk, False),
        (_garbage_read, False),
        (_last_row_dropped, False),
        (_accumulate_ignored, True),
        (_added_twice, True),
        (_expert_without_rows_left_out, False),
        (_rounded_to_bf16, False),
    ],
)
def test_weight_gradient_oracle_catches(fault, accumulate, device):
    check_weight_gradient(grouped_weight_gradient, RAGGED, device, accumulate=accumulate)
    with pytest.raises(AssertionError, match="gradient of expert"):
        check_weight_gradient(fault, RAGGED, device, accumulate=accumulate)


def test_arguments_that_do_not_fit():
    a, weight = torch.zeros(4, 8).bfloat16(), torch.zeros(2, 6, 8).bfloat16()
    ends_E, out = torch.tensor([1, 4], dtype=torch.int32), torch.zeros(2, 8, 8)

    def refused(match: str, a=a, weight=weight, ends_E=ends_E, *, transposed=True, **keywords):
        with pytest.raises(ValueError, match=match):
            grouped_matmul(a, weight, ends_E, transposed=transposed, **keywords)

    refused(r"a: expected shape \(4, 6\) .* found \(4, 8\)", transposed=False)
    refused(r"weight: expected torch.bfloat16 like the others, found torch.float32", weight=weight.float())
    refused(r"weight: expected 3 dimensions, found shape \(6, 8\)", weight=weight[0])
    refused(r"ends_E: expected a contiguous vector of torch.int32, found torch.int64", ends_E=ends_E.long())
    refused(r"ends_E: expected shape \(2,\) .* found \(1,\)", ends_E=ends_E[:1])
    refused(r"rows_R: expected a contiguous vector of torch.int32, found torch.float32", rows_R=torch.zeros(3))
    refused(r"backend torch: expected torch.bfloat16, found torch.float32", a.float(), weight.float(), backend="torch")
    refused(r"backend: expected one of reference, .* found 'cuda'", backend="cuda")

    def refused_gradient(match: str, d=a, x=a, out=out, *, accumulate=False, **keywords):
        with pytest.raises(ValueError, match=match):
            grouped_weight_gradient(d, x, ends_E, out, accumulate=accumulate, **keywords)

    refused_gradient(r"out_EOI: expected shape \(2, 8, 8\) .* found \(2, 8, 9\)", out=torch.zeros(2, 8, 9))
    refused_gradient(r"to accumulate in, found torch.bfloat16", out=out.bfloat16(), accumulate=True)
    refused_gradient(r"expected as many rows of d as of x", x=a[:3])


def test_unknown_products_take_the_knobs_of_the_nearest(monkeypatch):
    from ckptbridge.kernels import grouped_config

    def entry(kind: str, columns: int, **knobs: int) -> dict:
        product = {"kind": kind, "E": 8, "rows": 1000, "columns": columns, "depth": 64}
        return {"product": product, "config": {"block_rows": 128, "block_columns": 128, **knobs}}

    table = {"9.0": [entry("plain", 512, group=1), entry("plain", 4096, group=2), entry("gathered", 600, group=3)]}
    monkeypatch.setattr(grouped_config, "_table", lambda: table)
    grouped_config._nearest.cache_clear()
    try:
        of = {columns: Product("plain", 8, 900, columns, 64) for columns in (600, 3000)}
        assert grouped_config._nearest(of[600], "9.0", 232_448).group == 1
        assert grouped_config._nearest(of[3000], "9.0", 232_448).group == 2
        assert grouped_config._nearest(of[600], "8.0", 166_912) == DEFAULT
        assert grouped_config._nearest(of[600]._replace(kind="weight_gradient"), "9.0", 232_448) == DEFAULT
        assert grouped_config._nearest(of[600], "12.0", 101_376) == grouped_config.SMALL
    finally:
        grouped_config._nearest.cache_clear()
    assert config_for(of[600], torch.device("cpu")) == DEFAULT
