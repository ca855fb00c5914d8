"""A receipt finds, later, which tensor is no longer what it was."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.receipt import read_receipt
from ckptbridge.converters.recheck import recheck
from ckptbridge.converters.tensors import LazyTensor
from tests.conftest import TinyFolders


def flip_a_bit(tensor: LazyTensor) -> None:
    """In the middle of the tensor's bytes, where it is stored."""
    (extent, *_) = tensor.extents() or ()
    assert extent.path is not None
    with extent.path.open("r+b") as file:
        file.seek(extent.offset + extent.nbytes // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))


@pytest.mark.parametrize("name", ["llama_tied", "mixtral", "qwen2_moe"])
@pytest.mark.parametrize("side", ["source", "target"])
def test_a_flipped_bit_is_found_by_its_tensors_name(
    name: str, side: str, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_folder(name), source)
    options = ConvertOptions(layout=ParallelLayout(tp=2))
    execute(plan_conversion(open_model(source), tmp_path / "target", "torch_dist", options))
    receipt = read_receipt(tmp_path / "target")
    result = recheck(open_model(tmp_path / side), receipt)
    assert result.passed, result
    assert result.side == side
    model = open_model(tmp_path / side)
    for tensor in list(model.sources)[1::17]:
        flip_a_bit(model.sources[tensor])
        found = recheck(open_model(tmp_path / side), receipt)
        assert found.changed == (tensor,)
        assert not found.passed
        flip_a_bit(model.sources[tensor])


def test_the_receipt_of_another_model_is_refused(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    execute(plan_conversion(open_model(tiny_folder("llama")), tmp_path / "mcore", "torch_dist"))
    execute(plan_conversion(open_model(tiny_folder("mixtral")), tmp_path / "hf", "hf"))
    receipt = read_receipt(tmp_path / "hf")
    with pytest.raises(BadInputError, match="another's"):
        recheck(open_model(tmp_path / "mcore"), receipt)
