"""torch.save files with many tensors: planned, written by the copier, and read by torch, zipfile and ourselves."""

from __future__ import annotations

import argparse
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ckptbridge.converters.archive_file import Leaf, archive_file
from ckptbridge.converters.copying import Copier
from ckptbridge.converters.errors import NotSupportedError
from ckptbridge.converters.output import OutputFile
from ckptbridge.converters.pickles import Inert
from ckptbridge.converters.tensors import InMemory, Zeros
from ckptbridge.converters.torch_archive import read_archive, stored_tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


def samples(count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(), (1,), (0, 3), (7,), (5, 2), (2, 3, 4)]
    return {
        f"t{i}": torch.randint(0, 2, shapes[i % 6], generator=generator).to(DTYPES[i // 6 % 6]) for i in range(count)
    }


def written(folder: Path, file: OutputFile) -> Path:
    Copier(folder, workers=1, max_ram=1 << 20, progress=None, total=0).write(file)
    path = folder / file.name
    assert path.stat().st_size == file.size
    return path


def leaves(tensors: dict[str, Tensor]) -> dict[str, Leaf]:
    return {name: Leaf(name, InMemory(tensor)) for name, tensor in tensors.items()}


def test_torch_zipfile_and_we_read_a_tree_of_tensors(tmp_path: Path) -> None:
    tensors = samples(40)
    tree = {"args": argparse.Namespace(dtype=torch.bfloat16, size=(1, 2)), "model": leaves(tensors), "none": None}
    path = written(tmp_path, archive_file("a.pt", tree))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.namelist()[:2] == ["archive/data.pkl", "archive/byteorder"]
    with torch.serialization.safe_globals([argparse.Namespace]):
        for options in ({"weights_only": True}, {"weights_only": False}, {"weights_only": True, "mmap": True}):
            state = torch.load(path, **options)
            assert state["args"] == tree["args"]
            for name, tensor in tensors.items():
                assert state["model"][name].dtype == tensor.dtype
                assert torch.equal(state["model"][name], tensor)
    value, storages = read_archive(path)
    for name, tensor in tensors.items():
        assert torch.equal(stored_tensor(value["model"][name], path, storages, name).read(), tensor)


def test_tensors_begin_where_they_can_be_mapped() -> None:
    assert all(piece.offset % 64 == 0 for piece in archive_file("a.pt", {"model": leaves(samples(40))}).pieces)


def test_a_value_of_a_class_that_is_not_there_is_written_under_its_name(tmp_path: Path) -> None:
    """The slower pickler writes the same tensors."""
    tensors = samples(12)
    plain = archive_file("a.pt", {"model": leaves(tensors), "kind": 3})
    inert = Inert("megatron.core.enums.Kind", (3,))
    path = written(tmp_path, archive_file("a.pt", {"model": leaves(tensors), "kind": inert}))
    value, storages = read_archive(path)
    assert value["kind"] == inert
    assert [p.name for p in plain.pieces] == list(value["model"])
    for name, tensor in tensors.items():
        assert torch.equal(stored_tensor(value["model"][name], path, storages, name).read(), tensor)


def test_planning_twice_gives_the_same_bytes() -> None:
    def plan() -> list[Any]:
        file = archive_file("a.pt", OrderedDict(model=leaves(samples(30)), rest=[1, "x", None]))
        assert file.closing is not None
        return [file.size, file.patches, file.closing({piece.name: 7 for piece in file.pieces})]

    assert plan() == plan()


def test_a_dtype_that_torch_files_cannot_hold_is_refused_by_name() -> None:
    tree = {"model": {"w": Leaf("mp_rank_00:w", Zeros((2,), torch.float8_e4m3fn))}}
    with pytest.raises(NotSupportedError, match=r"mp_rank_00:w.*float8_e4m3fn"):
        archive_file("a.pt", tree)


def sparse(path: Path, file: OutputFile, ends: dict[str, bytes]) -> None:
    """Write all but the tensors' bytes, of which only the last are there: holes take no space and read as zeros."""
    crcs = dict.fromkeys((piece.name for piece in file.pieces), 0)
    assert file.closing is not None
    with path.open("wb") as out:
        for offset, data in (*file.patches, *(patch for p in file.pieces if p.frame for patch in p.frame(0))):
            out.seek(offset)
            out.write(data)
        for offset, data in file.closing(crcs):
            out.seek(offset)
            out.write(data)
        for piece in file.pieces:
            out.seek(piece.offset + piece.tensor.nbytes - len(ends[piece.name]))
            out.write(ends[piece.name])


def test_files_and_tensors_beyond_4_gib_are_read(tmp_path: Path) -> None:
    """One tensor is larger than 32 bits tell, one begins behind that; both are found by torch, zipfile and us."""
    rows, path = (1 << 32) // 4 + 3, tmp_path / "huge.pt"
    sizes = {"small": 5, "huge": rows, "behind": 7}
    file = archive_file(
        "huge.pt", {"model": {name: Leaf(name, Zeros((size,), torch.float32)) for name, size in sizes.items()}}
    )
    one = b"\x00\x00\x80\x3f"
    sparse(path, file, dict.fromkeys(sizes, one))
    assert path.stat().st_size == file.size > 1 << 32
    state = torch.load(path, mmap=True, weights_only=True)["model"]
    value, storages = read_archive(path)
    for name, size in sizes.items():
        assert state[name].shape == (size,)
        assert state[name][-2:].tolist() == [0.0, 1.0]
        stored = stored_tensor(value["model"][name], path, storages, name)
        assert stored.read_rows(size - 2, size).tolist() == [0.0, 1.0]
    with zipfile.ZipFile(path) as archive:
        assert {e.file_size for e in archive.infolist() if "/data/" in e.filename} == {4 * n for n in sizes.values()}


def test_more_tensors_than_16_bits_count_are_read(tmp_path: Path) -> None:
    """The directory counts its entries in 16 bits; more ask for its 64-bit form."""
    count = 66_000
    tensor = InMemory(torch.tensor([7], dtype=torch.uint8))
    path = written(tmp_path, archive_file("many.pt", {"model": [Leaf(str(n), tensor) for n in range(count)]}))
    with zipfile.ZipFile(path) as archive:
        assert len(archive.infolist()) == count + 3
        assert archive.read(f"archive/data/{count - 1}") == b"\x07"
    value, storages = read_archive(path)
    assert len(storages) == count
    assert stored_tensor(value["model"][-1], path, storages, "last").read().tolist() == [7]
    assert torch.load(path, weights_only=True)["model"][-1].tolist() == [7]
