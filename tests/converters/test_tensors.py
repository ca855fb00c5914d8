"""Lazy tensors against eager torch: every operation, every range of rows, and the bytes that extents promise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ckptbridge.converters.blocks import bytes_of, digest_of, row_blocks
from ckptbridge.converters.errors import BadInputError, StorageError
from ckptbridge.converters.reading import read_exactly, watched
from ckptbridge.converters.tensors import (
    Computed,
    InMemory,
    LazyTensor,
    Stored,
    Zeros,
    cast,
    columns,
    join_columns,
    join_rows,
    reshaped,
    rows,
    scaled,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8]
FLOATS = DTYPES[:4]


@dataclass
class Pair:
    """A lazy tensor and what torch says it holds."""

    lazy: LazyTensor
    eager: Tensor


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Tensor], Stored]:
    """Puts a tensor's bytes into a file of its own, behind a few bytes that are not its own."""
    folder = tmp_path_factory.mktemp("stored")
    count = 0

    def put(tensor: Tensor) -> Stored:
        nonlocal count
        count += 1
        path = folder / f"{count}.bin"
        junk = b"\xaa" * (count % 11)
        path.write_bytes(junk + raw(tensor) + junk)
        return Stored(path, len(junk), tuple(tensor.shape), tensor.dtype)

    return put


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def bytes_of_extents(lazy: LazyTensor) -> bytes | None:
    """The file bytes that a tensor's extents name, read without the package."""
    extents = lazy.extents()
    if extents is None:
        return None
    found = b""
    for extent in extents:
        if extent.path is None:
            found += bytes(extent.nbytes)
        else:
            found += extent.path.read_bytes()[extent.offset : extent.offset + extent.nbytes]
    return found


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


def check(pair: Pair) -> None:
    """Shape, dtype, every row range at the ends and in the middle, and the extents."""
    lazy, eager = pair.lazy, pair.eager
    assert lazy.shape == tuple(eager.shape)
    assert lazy.dtype == eager.dtype
    assert lazy.nbytes == eager.numel() * eager.element_size()
    assert torch.equal(lazy.read(), eager)
    count = eager.shape[0]
    for start, stop in {(0, count), (0, count // 2), (count // 2, count), (count // 3, count - count // 4)}:
        part = lazy.read_rows(start, stop)
        assert torch.equal(part, eager[start:stop])
        assert part.is_contiguous()
    found = bytes_of_extents(lazy)
    assert found is None or found == raw(eager)
    blocks = b"".join(bytes(block) for block in row_blocks(lazy, budget_nbytes=64))
    assert blocks == raw(eager)


@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_composition_is_what_torch_computes(store: Callable[[Tensor], Stored], data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    width = data.draw(st.integers(1, 6))

    def leaf(rows_: int, width_: int) -> Pair:
        kind = data.draw(st.sampled_from(["stored", "memory", "zeros"]))
        if kind == "zeros":
            return Pair(Zeros((rows_, width_), dtype), torch.zeros(rows_, width_, dtype=dtype))
        eager = drawn((rows_, width_), dtype, data.draw(st.integers(0, 1000)))
        return Pair(store(eager) if kind == "stored" else InMemory(eager), eager)

    value = leaf(data.draw(st.integers(0, 8)), width)
    for _ in range(data.draw(st.integers(0, 5))):
        count, wide = value.eager.shape
        step = data.draw(st.sampled_from(["rows", "join_rows", "columns", "join_columns", "reorder", "cast", "scaled"]))
        if step == "rows":
            start = data.draw(st.integers(0, count))
            stop = data.draw(st.integers(start, count))
            value = Pair(rows(value.lazy, start, stop), value.eager[start:stop])
        elif step == "join_rows":
            other = leaf(data.draw(st.integers(0, 4)), wide)
            other = Pair(cast(other.lazy, value.eager.dtype), other.eager.to(value.eager.dtype))
            value = Pair(join_rows([value.lazy, other.lazy]), torch.cat([value.eager, other.eager]))
        elif step == "reorder":  # as unpacking does: many ranges of one tensor
            ranges = [
                tuple(sorted(data.draw(st.tuples(st.integers(0, count), st.integers(0, count))))) for _ in range(3)
            ]
            lazy = join_rows([value.lazy] * 3, ranges)
            value = Pair(lazy, torch.cat([value.eager[a:b] for a, b in ranges]))
        elif step == "columns":
            start = data.draw(st.integers(0, wide - 1))
            stop = data.draw(st.integers(start + 1, wide))
            value = Pair(columns(value.lazy, start, stop), value.eager[:, start:stop])
        elif step == "join_columns":
            other = leaf(count, data.draw(st.integers(1, 3)))
            other = Pair(cast(other.lazy, value.eager.dtype), other.eager.to(value.eager.dtype))
            value = Pair(join_columns([value.lazy, other.lazy]), torch.cat([value.eager, other.eager], dim=1))
        elif step == "cast" and value.eager.dtype.is_floating_point:
            target = data.draw(st.sampled_from(FLOATS))
            value = Pair(cast(value.lazy, target), value.eager.to(target))
        elif step == "scaled" and value.eager.dtype in FLOATS[:3]:
            factor = data.draw(st.sampled_from([1.0, 2.0, 0.5, 3.0, 1 / 3]))
            expected = (value.eager.float() * factor).to(value.eager.dtype)
            value = Pair(scaled(value.lazy, factor), expected)
    check(value)


def test_joined_rows_of_one_file_stay_byte_ranges(store: Callable[[Tensor], Stored]) -> None:
    eager = drawn((12, 5), torch.bfloat16, seed=1)
    stored = store(eager)
    packed = join_rows([stored, stored, stored], [(0, 4), (6, 8), (8, 12)])
    assert len(packed.extents() or ()) == 2  # 6 to 8 and 8 to 12 touch
    again = join_rows([packed, Zeros((3, 5), torch.bfloat16), Zeros((1, 5), torch.bfloat16)], None)
    extents = again.extents()
    assert extents is not None
    assert [(extent.path is None, extent.nbytes) for extent in extents] == [(False, 40), (False, 60), (True, 40)]
    assert bytes_of_extents(again) == raw(again.read())
    assert rows(rows(stored, 2, 10), 1, 4).extents() == rows(stored, 3, 6).extents()
    assert rows(stored, 0, 12) is stored


def test_what_is_computed_gives_its_extents_up(store: Callable[[Tensor], Stored]) -> None:
    stored = store(drawn((4, 6), torch.float32, seed=2))
    for lazy in (columns(stored, 0, 3), cast(stored, torch.float16), scaled(stored, 2.0), join_columns([stored] * 2)):
        assert lazy.extents() is None
        assert join_rows([lazy, lazy]).extents() is None
    assert columns(stored, 0, 6) is stored
    assert cast(stored, torch.float32) is stored
    assert scaled(stored, 1.0) is stored
    assert join_columns([stored]) is stored


@pytest.mark.parametrize("kind", ["stored", "memory", "zeros"])
@pytest.mark.parametrize("shape", [(24,), (6, 4), (2, 3, 4), (1, 24)])
def test_reshaping_keeps_the_elements_in_order(
    store: Callable[[Tensor], Stored], kind: str, shape: tuple[int, ...]
) -> None:
    eager = torch.zeros(4, 6) if kind == "zeros" else drawn((4, 6), torch.float32, seed=3)
    lazy = {"stored": store, "memory": InMemory, "zeros": lambda t: Zeros(tuple(t.shape), t.dtype)}[kind](eager)
    check(Pair(reshaped(lazy, shape), eager.reshape(shape)))


def test_scalars_are_read(store: Callable[[Tensor], Stored]) -> None:
    scalar = torch.tensor(2.5)
    for lazy in (store(scalar), InMemory(scalar), Computed((), torch.float32, lambda low, high: scalar.reshape(1))):
        assert lazy.read().shape == ()
        assert lazy.read().item() == 2.5
        assert lazy.nbytes == 4
        assert digest_of(lazy) == digest_of(InMemory(scalar))
    assert Zeros((), torch.float32).read().shape == ()


@pytest.mark.parametrize("shape", [(64, 48), (1, 64, 48), (3072,), (1, 1, 3072)], ids=str)
def test_digests_take_no_more_memory_than_asked_for(store: Callable[[Tensor], Stored], shape: tuple[int, ...]) -> None:
    """However the bytes are divided into rows: the chunk of one layer is a single row."""
    eager = drawn(shape, torch.bfloat16, seed=5)
    lazy, blocks = store(eager), list[int]()
    expected = xxhash.xxh3_64(bytes_of(eager)).hexdigest()
    with watched(lambda _path, _offset, block: blocks.append(len(block))):
        assert digest_of(lazy, 1000) == expected
    assert max(blocks) <= 1000
    assert sum(blocks) == lazy.nbytes
    assert digest_of(InMemory(eager), 1000) == expected


def test_digests_of_what_is_cut_and_padded(store: Callable[[Tensor], Stored]) -> None:
    eager = drawn((9, 5), torch.float32, seed=6)
    lazy = store(eager)
    cut = join_rows([lazy, Zeros((2, 5), torch.float32), lazy, lazy], [(7, 9), (0, 2), (0, 3), (3, 6)])
    whole = torch.cat([eager[7:], torch.zeros(2, 5), eager[:6]])
    for budget in (3, 24, 1 << 20):
        assert digest_of(cut, budget) == xxhash.xxh3_64(bytes_of(whole)).hexdigest()
    assert digest_of(Zeros((0, 5), torch.float32)) == digest_of(InMemory(whole[:0])) == xxhash.xxh3_64().hexdigest()


def test_bf16_scaled_by_a_power_of_two_loses_nothing() -> None:
    eager = drawn((16, 16), torch.bfloat16, seed=4)
    there = scaled(InMemory(eager), 8.0)
    assert torch.equal(scaled(InMemory(there.read()), 0.125).read(), eager)
    thirds = scaled(InMemory(eager), 3.0)
    assert not torch.equal(scaled(InMemory(thirds.read()), 1 / 3).read(), eager)  # the check can fail


def test_widths_and_dtypes_that_differ_are_refused() -> None:
    tall = Zeros((4, 6), torch.float32)
    for other in (Zeros((4, 5), torch.float32), Zeros((4, 6), torch.bfloat16), Zeros((4,), torch.float32)):
        with pytest.raises(BadInputError, match="widths or dtypes differ") as refused:
            join_rows([tall, other])
        assert "[4, 6]" in str(refused.value)


@pytest.mark.parametrize("bounds", [(-1, 2), (3, 2), (0, 5), (5, 5)])
def test_rows_outside_the_tensor_are_refused(bounds: tuple[int, int]) -> None:
    with pytest.raises(BadInputError, match=f"rows {bounds[0]} to {bounds[1]}"):
        rows(Zeros((4, 6), torch.float32), *bounds)


def test_a_truncated_file_is_named_with_the_byte_where_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "cut.bin"
    path.write_bytes(bytes(100))
    stored = Stored(path, 20, (10, 4), torch.float32)
    assert stored.read_rows(0, 5).shape == (5, 4)  # bytes 20 to 100
    with pytest.raises(BadInputError) as refused:
        stored.read_rows(4, 10)
    for word in (str(path), "100", "84", "180"):
        assert word in str(refused.value)


def test_a_file_that_cannot_be_opened_is_the_disks_fault(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nothing_here") as failed:
        read_exactly(tmp_path / "nothing_here", 0, memoryview(bytearray(4)))
    assert failed.value.exit_code == 4
