"""`.metadata` as older megatron-core wrote it: 0.15 pickled a class of its own, with data of its own."""

from __future__ import annotations

import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch.distributed.checkpoint.metadata import Metadata

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import open_model
from tests.conftest import TinyFolders

MODULE = "megatron.core.dist_checkpointing.strategies.torch"


@dataclass
class MCoreMetadata(Metadata):
    """As in megatron-core 0.15."""

    mcore_data: dict[str, dict[str, Any]] | None = None


MCoreMetadata.__module__ = MODULE


def test_the_class_of_0_15_is_read(tiny_folder: TinyFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = tiny_folder("mixtral")
    execute(plan_conversion(open_model(hf), tmp_path / "megatron", "torch_dist", ConvertOptions(target_mcore=(0, 15))))
    file = tmp_path / "megatron" / "release" / ".metadata"
    module = ModuleType(MODULE)
    module.MCoreMetadata = MCoreMetadata  # type: ignore[attr-defined]
    with monkeypatch.context() as patched:
        for at in range(1, MODULE.count(".") + 1):
            name = ".".join(MODULE.split(".")[:at])
            patched.setitem(sys.modules, name, ModuleType(name))
        patched.setitem(sys.modules, MODULE, module)
        written = pickle.loads(file.read_bytes())
        file.write_bytes(pickle.dumps(MCoreMetadata(**vars(written), mcore_data={"embedding": {"shape": (1, 2)}})))
    assert MODULE.encode() in file.read_bytes()
    found, expected = open_model(tmp_path / "megatron"), open_model(hf)
    assert found.family == expected.family
    assert not [key for key, t in found.tensors.items() if not t.read().equal(expected.tensors[key].read())]
