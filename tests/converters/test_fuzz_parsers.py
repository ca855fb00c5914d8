"""The parsers of headers, `.metadata`, pickles and zip directories, with whatever hypothesis thinks of."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.mcore.torch_dist_reader import open_torch_dist
from ckptbridge.converters.pickles import TensorRef, read_pickle
from ckptbridge.converters.safetensors_header import DTYPES, read_header
from ckptbridge.converters.torch_archive import read_archive, stored_tensor
from tests.converters.fuzz_archives import mutate_archive, records
from tests.converters.fuzz_metadata import metadata_of, mutate_metadata
from tests.converters.fuzz_pickles import HOSTILE, alone, called, mutate_pickle, whole, within
from tests.converters.fuzz_sources import all_sources

MANY = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

numbers = st.one_of(st.integers(-2, 40), st.sampled_from([2**31, 2**62, 2**63, 2**64, 10**30, -(2**63)]), st.floats())
scalars = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=4)),
    max_leaves=12,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from([*DTYPES, "F33", ""]), values),
        "shape": st.one_of(st.lists(st.integers(0, 4), max_size=3), values),
        "data_offsets": st.one_of(st.lists(st.integers(0, 64), min_size=2, max_size=2), values),
    },
    optional={"more": values},
)
headers = st.dictionaries(st.text(max_size=6), st.one_of(entries, values), max_size=4)


@st.composite
def sound_headers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A header as it should be, and how many bytes of data it asks for."""
    header: dict[str, Any] = {}
    at = 0
    for name in draw(st.lists(st.text(min_size=1, max_size=6), unique=True, max_size=4)):
        kind = draw(st.sampled_from(sorted(DTYPES)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        size = DTYPES[kind].itemsize
        for n in shape:
            size *= n
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return header, at


def _written(path: Path, header: bytes, data: bytes, length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


@MANY
@given(header=headers, data=st.binary(max_size=80), cut=st.integers(0, 200))
def test_a_header_is_refused_or_describes_the_file(
    header: dict[str, Any], data: bytes, cut: int, tmp_path: Path
) -> None:
    path = _written(tmp_path / "x.safetensors", json.dumps(header).encode("utf-8", "surrogatepass"), data)
    if cut < 100:
        path.write_bytes(path.read_bytes()[:cut])
    try:
        found = read_header(path)
    except BadInputError as refused:
        assert str(path) in str(refused)  # noqa: PT017
        return
    size = path.stat().st_size
    assert sum(tensor.nbytes for tensor in found.values()) <= size
    assert all(t.offset >= 0 and t.offset + t.nbytes <= size for t in found.values())
    _same_as_safetensors(path, found)


@MANY
@given(described=sound_headers())
def test_what_the_library_reads_is_read_alike(described: tuple[dict[str, Any], int], tmp_path: Path) -> None:
    header, nbytes = described
    data = bytes(random.Random(nbytes).randbytes(nbytes))
    path = _written(tmp_path / "x.safetensors", json.dumps(header).encode("utf-8", "surrogatepass"), data)
    try:
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, UnicodeError):
        return
    _same_as_safetensors(path, read_header(path))


def _same_as_safetensors(path: Path, found: dict[str, Any]) -> None:
    with safe_open(path, "pt") as other:
        assert sorted(other.keys()) == sorted(found)
        for name, tensor in found.items():
            theirs = other.get_tensor(name)
            assert (theirs.dtype, tuple(theirs.shape)) == (tensor.dtype, tensor.shape)
            ours = tensor.read()
            assert ours.reshape(-1).view(torch.uint8).tolist() == theirs.reshape(-1).view(torch.uint8).tolist()


@pytest.fixture(scope="module")
def torch_dist(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return dict(all_sources(tmp_path_factory.mktemp("making") / "x")["torch_dist"].files)


@MANY
@given(seed=st.integers(0, 2**32), times=st.integers(1, 3))
def test_metadata_is_refused_or_tiles_its_tensors(
    seed: int, times: int, torch_dist: dict[str, bytes], tmp_path: Path
) -> None:
    _, metadata = metadata_of(torch_dist)
    rng = random.Random(seed)
    try:
        for _ in range(times):
            mutate_metadata(metadata, rng)
    except (AttributeError, TypeError, KeyError, ValueError, IndexError):
        pass  # the second change finds nothing to change: the first one stays
    folder = tmp_path / "release"
    folder.mkdir(exist_ok=True)
    for name, data in torch_dist.items():
        if name.startswith("release/"):
            (tmp_path / name).write_bytes(data)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    try:
        opened = open_torch_dist(folder)
    except BadInputError as refused:
        assert str(folder) in str(refused)  # noqa: PT017
        return
    for whole_tensor in opened.tensors.values():
        for chunk in whole_tensor.chunks:
            assert chunk.at + chunk.nbytes <= chunk.path.stat().st_size
            assert all(
                o >= 0 and o + n <= s for o, n, s in zip(chunk.offsets, chunk.sizes, whole_tensor.shape, strict=True)
            )


@settings(parent=MANY, max_examples=300)
@given(seed=st.integers(0, 2**32))
def test_a_spoiled_pickle_is_refused_or_read(seed: int, torch_dist: dict[str, bytes]) -> None:
    _, data = mutate_pickle(torch_dist["release/.metadata"], random.Random(seed))
    begun = time.process_time()
    try:
        read_pickle(data, "the/file")
    except BadInputError as refused:
        assert "the/file" in str(refused)  # noqa: PT017
        assert len(str(refused)) < 1000  # noqa: PT017
    assert time.process_time() - begun < 5


@MANY
@given(
    data=st.one_of(
        st.binary(max_size=60),
        st.lists(st.sampled_from(b"()]}l.tdNKMJXuaesbRcq\x85\x86\x94\x81\x93"), max_size=40).map(bytes),
    )
)
def test_noise_is_no_pickle(data: bytes) -> None:
    try:
        read_pickle(b"\x80\x04" + data, "the/file")
    except BadInputError as refused:
        assert "the/file" in str(refused)  # noqa: PT017


plain = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**200), 2**200), st.floats(allow_nan=False), st.text(), st.binary()
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.dictionaries(st.one_of(st.text(), st.integers(), st.tuples(st.integers(), st.text())), inner, max_size=4),
        st.sets(st.integers(), max_size=4),
        st.frozensets(st.text(), max_size=4),
    ),
    max_leaves=20,
)


@MANY
@given(value=plain, protocol=st.sampled_from([2, 3, 4, 5]))
def test_what_python_pickles_is_read_as_python_reads_it(value: Any, protocol: int) -> None:
    assert read_pickle(pickle.dumps(value, protocol), "file") == value


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_takes_neither_time_nor_memory(name: str, torch_dist: dict[str, bytes]) -> None:
    """Refused, or a harmless value; measured by what it may allocate and how long it takes."""
    metadata = torch_dist["release/.metadata"]
    for data in (alone(HOSTILE[name]), within(metadata, HOSTILE[name], random.Random(0))):
        _forget_peak()
        before, begun = _status("VmRSS:"), time.process_time()
        try:
            made: object = read_pickle(data, "the/file")
        except BadInputError as refused:
            made = str(refused)
            assert "the/file" in str(refused)  # noqa: PT017
        assert time.process_time() - begun < 5
        assert _status("VmHWM:") - before < (64 << 20) + 64 * len(data)
        del made


def test_a_memo_and_a_budget_do_not_stop_what_is_large_and_sound() -> None:
    """A hundred thousand places, shared names, tuples as keys: what a large checkpoint's metadata is made of."""
    value = {
        (f"layer.{i}", (i, 0)): {"path": "__0_0.distcp", "at": i, "sizes": torch.Size((1, i))} for i in range(50_000)
    }
    assert read_pickle(pickle.dumps(value, 2), "file") == value


def test_a_pickle_may_not_ask_for_far_more_than_it_holds() -> None:
    """The same call twenty times is fine; as often as it has bytes is not."""
    text = b"X" + struct.pack("<I", 100_000) + b"x" * 100_000
    encode = b"c_codecs\nencode\n"
    few, many = (alone(text + b"q\x00(" + (encode + b"h\x00\x85R") * count + b"l") for count in (20, 20_000))
    assert len(read_pickle(few, "file")) == 20
    with pytest.raises(BadInputError, match="far more"):
        read_pickle(many, "file")
    with pytest.raises(BadInputError, match="bytearray"):
        read_pickle(alone(called("builtins", "bytearray", whole(10**9))), "file")


@settings(parent=MANY, max_examples=400)
@given(seed=st.integers(0, 2**32))
def test_a_spoiled_archive_is_refused_or_points_into_itself(seed: int, tmp_path: Path) -> None:
    out = io.BytesIO()
    torch.save({"a": torch.arange(12.0).reshape(3, 4), "b": torch.zeros(0), "c": [1]}, out)
    _, data = mutate_archive(out.getvalue(), random.Random(seed))
    path = tmp_path / "x.pt"
    path.write_bytes(data)
    try:
        value, storages = read_archive(path)
        held = value.values() if isinstance(value, dict) else ()
        tensors = [stored_tensor(ref, path, storages, str(path)) for ref in held if isinstance(ref, TensorRef)]
    except BadInputError as refused:
        assert str(path) in str(refused)  # noqa: PT017
        return
    assert all(t.offset >= 0 and t.offset + t.nbytes <= len(data) for t in tensors)


@MANY
@given(count=st.integers(0, 2**16 - 1), nbytes=st.integers(0, 2**32 - 1), at=st.integers(0, 2**32 - 1))
def test_any_end_record_is_refused_or_right(count: int, nbytes: int, at: int, tmp_path: Path) -> None:
    out = io.BytesIO()
    torch.save({"a": torch.ones(3)}, out)
    data = bytearray(out.getvalue())
    end = records(bytes(data))["end"][0]
    struct.pack_into("<HII", data, end + 10, count, nbytes, at)
    path = tmp_path / "x.pt"
    path.write_bytes(data)
    try:
        found = read_archive(path)
    except BadInputError as refused:
        assert str(path) in str(refused)  # noqa: PT017
    else:  # 0xFFFF sends the reader to the 64-bit record, which torch always writes
        path.write_bytes(out.getvalue())
        assert found == read_archive(path)


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")
