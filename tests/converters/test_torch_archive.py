"""Archives of torch.save: ours read by torch and zipfile, torch's read by ours, and every broken one refused."""

from __future__ import annotations

import io
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ckptbridge.converters import torch_archive
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.pickles import StorageRef, TensorRef, read_pickle
from ckptbridge.converters.torch_archive import read_archive, stored_tensor, tensor_archive

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]
SHAPES = [(), (1,), (0,), (3, 0, 2), (7,), (4, 6), (1, 5, 2), (2, 3, 4, 5)]


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def sample(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    values = _counted(shape)
    return (values % 2 if dtype == torch.bool else values).to(dtype)


def _counted(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def our_archive(tensor: Tensor, at: int = 0) -> bytes:
    """The archive of a tensor as a file would hold it at byte `at`, without what stands before it."""
    plan = tensor_archive(tuple(tensor.shape), tensor.dtype)
    data = raw(tensor)
    whole = bytearray(plan.size)
    for offset, part in plan.frame(at, crc32(data)):
        whole[offset - at : offset - at + len(part)] = part
    whole[plan.data_offset : plan.data_offset + len(data)] = data
    return bytes(whole)


def torch_archive_of(value: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def read_back(path: Path, offset: int = 0, length: int | None = None) -> Tensor:
    value, storages = read_archive(path, offset, length)
    assert isinstance(value, TensorRef)
    return stored_tensor(value, path, storages, str(path)).read()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_and_zipfile_read_ours(shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = sample(shape, dtype)
    blob = our_archive(tensor)
    loaded = torch.load(io.BytesIO(blob), weights_only=True)
    assert (loaded.shape, loaded.dtype, raw(loaded)) == (tensor.shape, dtype, raw(tensor))
    assert loaded.is_contiguous()
    assert loaded.requires_grad is False
    with zipfile.ZipFile(io.BytesIO(blob)) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
    assert set(names) == {f"archive/{n}" for n in ("data.pkl", "byteorder", "data/0", "version")}
    path = tmp_path / "ours.pt"
    path.write_bytes(blob)
    assert raw(read_back(path)) == raw(tensor)
    if tensor.numel():
        assert raw(torch.load(path, mmap=True, weights_only=True)) == raw(tensor)


@pytest.mark.parametrize("at", [0, 64, 6400])
def test_tensor_bytes_begin_at_a_multiple_of_64(at: int) -> None:
    for shape in SHAPES:
        plan = tensor_archive(shape, torch.bfloat16)
        assert (at + plan.data_offset) % 64 == 0
        assert our_archive(sample(shape, torch.bfloat16), at) == our_archive(sample(shape, torch.bfloat16), 0)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 9), max_size=4), st.sampled_from(DTYPES), st.sampled_from([0, 64, 256]))
def test_an_archive_amid_others_is_found_by_offset_and_length(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], dtype: torch.dtype, at: int
) -> None:
    tensor = sample(tuple(shape), dtype)
    blob = our_archive(tensor, at)
    path = tmp_path_factory.mktemp("amid") / "row.distcp"
    path.write_bytes(b"\x50" * at + blob + our_archive(sample((3,), torch.int8)))
    assert raw(read_back(path, at, len(blob))) == raw(tensor)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ours_reads_torchs(shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = sample(shape, dtype)
    path = tmp_path / "theirs.pt"
    torch.save(tensor, path)
    back = read_back(path)
    assert (back.shape, back.dtype, raw(back)) == (tensor.shape, dtype, raw(tensor))
    torch.save(torch.nn.Parameter(tensor) if dtype.is_floating_point else tensor, path)
    assert raw(read_back(path)) == raw(tensor)


VIEWS: dict[str, tuple[Tensor, bool]] = {
    "a row range": (_counted((6, 4))[2:5], True),
    "one row": (_counted((6, 4))[3], True),
    "an element": (_counted((6, 4))[3, 2], True),
    "a column of one": (_counted((6, 1))[:, 0], True),
    "a transposed vector": (_counted((1, 6)).t(), True),
    "transposed": (_counted((6, 4)).t(), False),
    "a column range": (_counted((6, 4))[:, 1:3], False),
    "every other row": (_counted((6, 4))[::2], False),
    "expanded": (_counted((1, 4)).expand(3, 4), False),
    "an empty view": (_counted((6, 4))[:, 2:2], True),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_saved_view_is_read_right_or_refused(name: str, tmp_path: Path) -> None:
    view, contiguous = VIEWS[name]
    path = tmp_path / "view.pt"
    torch.save(view, path)
    if contiguous:
        assert torch.equal(read_back(path), view)
    else:
        with pytest.raises(BadInputError, match="not contiguous") as refused:
            read_back(path)
        assert str(path) in str(refused.value)


def test_objects_with_tensors_inside(tmp_path: Path) -> None:
    shared = _counted((4, 3))
    path = tmp_path / "state.pt"
    torch.save([{"a": shared, "b": shared[1:], "step": 3, "dtype": torch.bfloat16, "none": None}], path)
    (state,), storages = read_archive(path)
    assert (state["step"], state["dtype"], state["none"]) == (3, torch.bfloat16, None)
    for name, expected in (("a", shared), ("b", shared[1:])):
        assert torch.equal(stored_tensor(state[name], path, storages, "x").read(), expected)


@pytest.mark.parametrize("limit", [64, 200])
def test_a_directory_of_64_bit_numbers_is_read_again(
    limit: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every size and offset above the limit goes to the 64-bit fields: reader and writer agree on them."""
    monkeypatch.setattr(torch_archive, "_LIMIT", limit)
    tensor = _counted((40, 5))
    blob = our_archive(tensor)
    assert struct.pack("<I", 0x06064B50) in blob  # the 64-bit end record is there
    path = tmp_path / "wide.pt"
    path.write_bytes(blob)
    assert torch.equal(read_back(path), tensor)


def test_an_archive_above_4_gib_is_read_by_zipfile_and_torch(tmp_path: Path) -> None:
    """A hole in the file stands for the data, so it takes no space; sizes and offsets do not fit 32 bits."""
    rows, path = (1 << 32) // 4 + 3, tmp_path / "huge.pt"
    plan = tensor_archive((rows,), torch.float32)
    tail = b"\x00\x00\x80\x3f"  # the last element is 1.0
    with path.open("wb") as file:
        for offset, part in plan.frame(0, 0):
            file.seek(offset)
            file.write(part)
        file.seek(plan.data_offset + 4 * (rows - 1))
        file.write(tail)
    assert path.stat().st_size == plan.size > 1 << 32
    loaded = torch.load(path, mmap=True, weights_only=True)
    assert loaded.shape == (rows,)
    assert loaded[-1].item() == 1.0
    with zipfile.ZipFile(path) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        assert archive.read("archive/version") == b"3\n"  # it stands behind the data, above 4 GiB
    assert sizes["archive/data/0"] == 4 * rows
    value, storages = read_archive(path)
    stored = stored_tensor(value, path, storages, "x")
    assert stored.shape == (rows,)
    assert stored.read_rows(rows - 2, rows).tolist() == [0.0, 1.0]


def test_zipfiles_own_64_bit_archives_are_read(tmp_path: Path) -> None:
    """zipfile writes the sizes of a forced 64-bit entry into the extra field of both headers."""
    tensor, path = _counted((5, 3)), tmp_path / "forced.pt"
    with zipfile.ZipFile(io.BytesIO(our_archive(tensor))) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            with target.open(name, "w", force_zip64=True) as entry:
                entry.write(source.read(name))
    assert torch.equal(read_back(path), tensor)


def boundaries(blob: bytes) -> list[int]:
    """The bytes at which a part of the archive begins or ends, and their neighbours."""
    marks = {0, 1, len(blob) - 1}
    with zipfile.ZipFile(io.BytesIO(blob)) as archive:
        for entry in archive.infolist():
            start = entry.header_offset + 30 + len(entry.filename)
            marks |= {entry.header_offset, start, entry.header_offset + 26}
        marks.add(archive.start_dir)
        central = archive.start_dir
    end = blob.rindex(b"PK\x05\x06")
    marks |= {end, end + 10, end + 21, (central + end) // 2}
    return sorted({at + by for at in marks for by in (-1, 0, 1) if 0 <= at + by < len(blob)})


@pytest.mark.parametrize("make", [our_archive, torch_archive_of], ids=["ours", "torchs"])
def test_an_archive_cut_anywhere_is_bad_input(make: Any, tmp_path: Path) -> None:
    blob, path = make(_counted((50, 7))), tmp_path / "cut.pt"
    for size in boundaries(blob):
        path.write_bytes(blob[:size])
        with pytest.raises(BadInputError) as refused:
            read_archive(path)
        assert str(path) in str(refused.value)
        with pytest.raises(BadInputError, match="truncated") as refused:  # the length that the metadata promised
            read_archive(path, 0, len(blob))
        assert str(path) in str(refused.value)


def test_other_files_are_bad_input(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    for data in (b"", b"PK", b"x" * 100, b"PK\x05\x06" + bytes(18), b"PK\x05\x06" + b"\xff" * 18, bytes(5000)):
        path.write_bytes(data)
        with pytest.raises(BadInputError, match=str(path)):
            read_archive(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"N." * 100)
    with pytest.raises(BadInputError, match="compressed"):
        read_archive(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/readme", b"nothing")
    with pytest.raises(BadInputError, match=r"data\.pkl is missing"):
        read_archive(path)
    with pytest.raises(BadInputError, match="missing"):
        read_archive(tmp_path / "absent.pt")


@pytest.mark.parametrize("make", [our_archive, torch_archive_of], ids=["ours", "torchs"])
def test_damage_anywhere_is_bad_input_or_harmless(make: Any, tmp_path: Path) -> None:
    """One byte after another is overwritten; what is not noticed must not raise anything else either."""
    tensor = _counted((3, 2))
    blob, path = make(tensor), tmp_path / "damaged.pt"
    noise = random.Random(7)
    refused = 0
    for at in range(len(blob)):
        damaged = bytearray(blob)
        damaged[at] ^= noise.choice([0x01, 0x80, 0xFF, 0x10])
        path.write_bytes(damaged)
        try:
            value, storages = read_archive(path)
            if isinstance(value, TensorRef):
                stored_tensor(value, path, storages, "x").read()
        except BadInputError as error:
            refused += 1
            assert str(error)  # noqa: PT017
    assert refused > 50


REFERENCES: dict[str, TensorRef] = {
    "beyond the storage": TensorRef(StorageRef("0", torch.float32, 6), 2, (6,), (1,)),
    "before the storage": TensorRef(StorageRef("0", torch.float32, 6), -1, (2,), (1,)),
    "another storage": TensorRef(StorageRef("7", torch.float32, 6), 0, (6,), (1,)),
    "negative sizes": TensorRef(StorageRef("0", torch.float32, 6), 0, (-2, -3), (3, 1)),
    "too few strides": TensorRef(StorageRef("0", torch.float32, 6), 0, (2, 3), (1,)),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_a_reference_that_lies_is_bad_input(name: str, tmp_path: Path) -> None:
    path = tmp_path / "lies.pt"
    path.write_bytes(our_archive(_counted((6,))))
    _, storages = read_archive(path)
    with pytest.raises(BadInputError, match="the tensor"):
        stored_tensor(REFERENCES[name], path, storages, "the tensor")


class _Reference:
    """Pickles to the call by which torch rebuilds a tensor, with these arguments behind the storage."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, (_Storage(), *self.arguments, False, OrderedDict())


class _Storage:
    pass


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return ("storage", torch.FloatStorage, "0", "cpu", 6) if isinstance(obj, _Storage) else None


@pytest.mark.parametrize(
    "arguments",
    [
        ("0", (2,), (1,)),
        (0.5, (2,), (1,)),
        (0, ("2",), (1,)),
        (0, (1.5,), (1,)),
        (0, "22", (3, 1)),
        (0, (2, 3), (1,)),
        (0, (2, 3), ("3", "1")),
        (0, None, None),
        (0, (-2, -3), (3, 1)),
        (-1, (2,), (1,)),
    ],
    ids=str,
)
def test_a_pickled_reference_that_is_no_tensor_is_bad_input(arguments: tuple[Any, ...], tmp_path: Path) -> None:
    out = io.BytesIO()
    _Pickler(out, protocol=2).dump(_Reference(*arguments))
    path = tmp_path / "lies.pt"
    with zipfile.ZipFile(io.BytesIO(our_archive(_counted((6,))))) as good, zipfile.ZipFile(path, "w") as bad:
        for name in good.namelist():
            bad.writestr(name, out.getvalue() if name.endswith("data.pkl") else good.read(name))
    with pytest.raises(BadInputError, match=str(path)):
        read_back(path)
    out.seek(0)
    out.truncate()
    _Pickler(out, protocol=2).dump(_Reference(0, (2, 3), (3, 1)))  # a sound one is read
    assert isinstance(read_pickle(out.getvalue(), "x"), TensorRef)
