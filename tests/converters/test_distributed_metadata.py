"""`.metadata` without torch.distributed.checkpoint: what it writes are torch's own classes, and it reads torch's."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata, planner

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.mcore import distributed_metadata as ours
from ckptbridge.converters.pickles import Inert, read_pickle
from tests.converters.running import ROOT


def plain(value: Any) -> Any:
    """A value without its classes' modules: two that are alike field by field become equal."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return type(value).__name__.lstrip("_"), fields
    if isinstance(value, dict):
        return [(plain(key), plain(entry)) for key, entry in value.items()]
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, torch.memory_format):
        return f"TORCH_{str(value).removeprefix('torch.').upper()}"
    return value


def of_torch() -> metadata.Metadata:
    sizes = torch.Size((4, 2))
    return metadata.Metadata(
        state_dict_metadata={
            "a.weight": metadata.TensorStorageMetadata(
                metadata.TensorProperties(dtype=torch.bfloat16),
                torch.Size((8, 2)),
                [metadata.ChunkStorageMetadata(torch.Size((row, 0)), sizes) for row in (0, 4)],
            ),
            "b": metadata.BytesStorageMetadata(),
        },
        planner_data=None,
        storage_data={
            metadata.MetadataIndex("a.weight", torch.Size((0, 0)), 0): filesystem._StorageInfo("__0_0.distcp", 0, 100),
            metadata.MetadataIndex("a.weight", torch.Size((4, 0)), 1): filesystem._StorageInfo("__1_0.distcp", 5, 100),
            metadata.MetadataIndex("b"): filesystem._StorageInfo("__0_0.distcp", 100, 7, ["zstd"]),
        },
        storage_meta=metadata.StorageMeta(checkpoint_id="/somewhere", save_id="x", modules=["m"]),
        version="1.0.0",
    )


def of_ours() -> ours.Metadata:
    sizes = torch.Size((4, 2))
    return ours.Metadata(
        state_dict_metadata={
            "a.weight": ours.TensorStorageMetadata(
                ours.TensorProperties(dtype=torch.bfloat16),
                torch.Size((8, 2)),
                [ours.ChunkStorageMetadata(torch.Size((row, 0)), sizes) for row in (0, 4)],
            ),
            "b": ours.BytesStorageMetadata(),
        },
        storage_data={
            ours.MetadataIndex("a.weight", torch.Size((0, 0)), 0): ours.StorageInfo("__0_0.distcp", 0, 100),
            ours.MetadataIndex("a.weight", torch.Size((4, 0)), 1): ours.StorageInfo("__1_0.distcp", 5, 100),
            ours.MetadataIndex("b"): ours.StorageInfo("__0_0.distcp", 100, 7, ["zstd"]),
        },
        storage_meta=ours.StorageMeta(checkpoint_id="/somewhere", save_id="x", modules=["m"]),
        version="1.0.0",
    )


def test_torchs_own_reader_finds_torchs_own_classes(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(ours.pickled(of_ours()))
    read = dcp.FileSystemReader(tmp_path).read_metadata()
    read.storage_meta.load_id = None  # what the reader adds
    assert type(read) is metadata.Metadata
    assert repr(read) == repr(of_torch())
    assert read == of_torch()
    for index, info in read.storage_data.items():
        assert (type(index), type(info)) == (metadata.MetadataIndex, filesystem._StorageInfo)
    assert b"ckptbridge" not in ours.pickled(of_ours())


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_torch_wrote_is_read_field_by_field(protocol: int) -> None:
    read = read_pickle(pickle.dumps(of_torch(), protocol), "file")
    assert isinstance(read, ours.Metadata)
    assert plain(read) == plain(of_torch()) == plain(of_ours())
    other = of_torch()
    other.state_dict_metadata["a.weight"].chunks[1].sizes = torch.Size((4, 1))
    assert plain(read) != plain(other)  # the comparison can fail


def test_every_field_of_torchs_classes_is_here() -> None:
    named = {name: mine for name, mine in ours.NAMES.items() if name.startswith("torch.")}
    assert len(named) == 9
    for name, mine in named.items():
        module, _, theirs = name.rpartition(".")
        real = getattr({"metadata": metadata, "filesystem": filesystem}[module.rpartition(".")[2]], theirs)
        if issubclass(real, Enum):
            assert [(e.name, e.value) for e in real] == [(e.name, e.value) for e in mine]  # type: ignore[attr-defined]
        else:
            assert [f.name for f in dataclasses.fields(real)] == [f.name for f in dataclasses.fields(mine)]


def test_the_plan_of_a_save_is_carried_as_inert_values() -> None:
    saved = of_torch()
    item = planner.WriteItem(
        metadata.MetadataIndex("a.weight", torch.Size((0, 0))),
        planner.WriteItemType.SHARD,
        tensor_data=planner.TensorWriteData(
            metadata.ChunkStorageMetadata(torch.Size((0,)), torch.Size((1,))),
            metadata.TensorProperties(dtype=torch.float32),
            torch.Size((1,)),
        ),
    )
    saved.planner_data = [planner.SavePlan([item])]
    read = read_pickle(pickle.dumps(saved), "file")
    assert isinstance(read.planner_data[0], Inert)
    assert plain(read.state_dict_metadata) == plain(of_torch().state_dict_metadata)


def test_a_class_of_torchs_that_no_checkpoint_needs_is_refused() -> None:
    data = b"\x80\x02ctorch.distributed.checkpoint.metadata\nStatefulT\n."
    with pytest.raises(BadInputError, match="StatefulT"):
        read_pickle(data, "file")


SPARED = ("torch.distributed.checkpoint", "transformers", "huggingface_hub", "sympy", "pandas", "matplotlib", "rich")


def test_a_conversion_imports_nothing_that_it_does_not_need() -> None:
    code = (
        "import sys; from ckptbridge.converters import convert, execute, model;"
        f"print([name for name in {SPARED} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_help_does_not_import_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "ckptbridge", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & {"torch", "numpy", "transformers", "ckptbridge.converters.model"}
