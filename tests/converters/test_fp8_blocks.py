"""fp8 weights are read as code times scale, to the last bit, wherever their rows and columns end up."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.fp8_blocks import BlockScaled, BlockSize
from ckptbridge.converters.tensors import InMemory, LazyTensor, cast, columns, join_rows, reshaped, rows
from tests.converters.fp8_models import meant

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def every_code() -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)


def random_codes(*shape: int, seed: int = 0) -> Tensor:
    """Every code but the two that are no number."""
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return codes.where((codes & 0x7F) != 0x7F, 0x3C).view(torch.float8_e4m3fn)


def random_scales(*shape: int, seed: int = 0) -> Tensor:
    return torch.exp(torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 8)


def view(codes: Tensor, scales: Tensor, block: tuple[int, int] = (128, 128), height: int | None = None) -> BlockScaled:
    size = BlockSize(*block)
    return BlockScaled(InMemory(codes), InMemory(scales), size, torch.bfloat16, where="test", height=height)


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    numbers = ~expected.isnan()
    assert torch.equal(found.isnan(), ~numbers)
    kind = torch.int32 if found.dtype == torch.float32 else torch.int16
    assert torch.equal(found[numbers].view(kind), expected[numbers].view(kind))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "scale", [1.0, 3e-4, 1 / 3, 1e-38, 1e-44, 0.0, -0.7, 255.9, 256.0, 1e10, 1e38, torch.finfo(torch.float32).tiny]
)
def test_every_code_times_a_scale(scale: float, dtype: torch.dtype) -> None:
    codes, scales = every_code().reshape(2, 128), torch.tensor([[scale]])
    assert_same_bits(cast(view(codes, scales), dtype).read(), meant(codes, scales, (128, 128), dtype))


def test_the_two_codes_that_are_no_numbers_stay_so() -> None:
    found = view(every_code().reshape(1, 256), torch.ones(1, 2)).read()[0]
    assert found.isnan().nonzero().flatten().tolist() == [0x7F, 0xFF]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_may_be_narrow(dtype: torch.dtype) -> None:
    """Qwen3's fp8 files have them in bf16."""
    codes, scales = random_codes(300, 200), random_scales(3, 2).to(dtype)
    assert_same_bits(view(codes, scales).read(), meant(codes, scales, (128, 128)))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_rows_and_columns_of_any_shape(data: st.DataObject) -> None:
    """Ragged edges, other block sizes, stacks of matrices, ranges that begin within a block."""
    block = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)) | st.just((128, 128)))
    matrices, height, width = (
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 300)),
        data.draw(st.integers(1, 300)),
    )
    grid = BlockSize(*block).grid((matrices, height, width))
    codes, scales = random_codes(matrices, height, width, seed=height), random_scales(*grid, seed=width)
    flat = view(codes.flatten(0, 1), scales.flatten(0, 1), block, height)
    expected = meant(codes, scales, block).flatten(0, 1)
    start = data.draw(st.integers(0, len(expected)))
    stop = data.draw(st.integers(start, len(expected)))
    left = data.draw(st.integers(0, width - 1))
    right = data.draw(st.integers(left + 1, width))
    assert_same_bits(flat.read_rows(start, stop), expected[start:stop])
    assert_same_bits(columns(flat, left, right).read_rows(start, stop), expected[start:stop, left:right])
    assert columns(flat, left, right).shape == (len(expected), right - left)


def test_a_chunk_is_smaller_than_a_band_of_wide_rows() -> None:
    codes, scales = random_codes(130, 3000), random_scales(2, 24)
    assert_same_bits(view(codes, scales).read(), meant(codes, scales, (128, 128)))
    codes, scales = random_codes(2, 140_000), random_scales(1, 1094)
    assert_same_bits(view(codes, scales).read(), meant(codes, scales, (128, 128)))


def test_a_wider_dtype_is_not_rounded_on_the_way() -> None:
    """Joined, cut and padded tensors too: a cast after rounding to bf16 would lose the scale's bits."""
    codes, scales = random_codes(256, 256), random_scales(2, 2)
    joined = join_rows([view(codes, scales), view(codes, scales)], [(0, 130), (7, 256)])
    whole = meant(codes, scales, (128, 128), torch.float32)
    expected = torch.cat([whole[:130], whole[7:]])
    for dtype in DTYPES:
        assert_same_bits(cast(joined, dtype).read(), expected.to(dtype))
        assert_same_bits(rows(cast(joined, dtype), 100, 200).read(), expected[100:200].to(dtype))
        assert_same_bits(columns(cast(view(codes, scales), dtype), 5, 99).read(), whole[:, 5:99].to(dtype))
    assert not torch.equal(joined.read().float(), expected)


def test_a_stack_that_is_taken_apart_is_read_by_rows() -> None:
    codes, scales = random_codes(4, 100, 60), random_scales(4, 1, 1)
    stack = reshaped(view(codes.flatten(0, 1), scales.flatten(0, 1), height=100), (4, 100, 60))
    expected = meant(codes, scales, (128, 128))
    assert_same_bits(stack.read(), expected)
    flat = reshaped(stack, (400, 60))
    assert isinstance(flat, BlockScaled)
    assert_same_bits(flat.read_rows(90, 310), expected.flatten(0, 1)[90:310])


def test_threads_do_not_disturb_each_other() -> None:
    codes, scales = random_codes(1024, 700), random_scales(8, 6)
    made, expected = view(codes, scales), meant(codes, scales, (128, 128))
    with ThreadPoolExecutor(8) as pool:
        for start, found in zip(
            range(0, 1024, 16), pool.map(lambda i: made.read_rows(i, i + 16), range(0, 1024, 16)), strict=True
        ):
            assert_same_bits(found, expected[start : start + 16])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_scale_that_is_not_finite_is_told_by_place(bad: float) -> None:
    scales = random_scales(3, 2)
    scales[2, 1] = bad
    made = view(random_codes(300, 200), scales)
    made.read_rows(0, 256)
    with pytest.raises(BadInputError, match=r"test: the scale at \[2, 1\] is"):
        made.read_rows(200, 300)


class _Counted(LazyTensor):
    """Which rows were read of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.inner, self.shape, self.dtype = InMemory(tensor), tuple(tensor.shape), tensor.dtype
        self.seen: list[tuple[int, int]] = []

    def read_rows(self, start: int, stop: int) -> Tensor:
        self.seen.append((start, stop))
        return self.inner.read_rows(start, stop)


def test_no_more_is_read_than_is_wanted() -> None:
    """One read of the rows, and one of the scales that they need."""
    codes, scales = _Counted(random_codes(1000, 64)), _Counted(random_scales(8, 1))
    made = BlockScaled(codes, scales, BlockSize(128, 128), torch.bfloat16, where="test")
    made.read_rows(300, 600)
    assert (codes.seen, scales.seen) == ([(300, 600)], [(2, 5)])


@pytest.mark.parametrize("nan", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_is_what_was_announced(dtype: torch.dtype, nan: bool) -> None:
    """All that a read allocates, in a new thread and beside the codes that are here already."""
    codes = random_codes(3000, 640)
    if nan:
        codes.view(torch.uint8)[::128] = 0x7F
    made = cast(view(codes, random_scales(24, 5)), dtype)
    assert made.work_row_nbytes == made.row_nbytes + 640
    _allocated(made)  # the profiler has to be used in the thread that loaded torch before it is in another one
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(_allocated, made).result()
    assert 0 <= taken - made.nbytes < 1.3 * 2**20


def _allocated(tensor: LazyTensor) -> int:
    """The most bytes that one read holds at any time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    # torch 2.11 warns of cycles unless events of all of them are kept; here there is one.
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as taken:
        tensor.read()
    held = most = 0
    for event in taken.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most
