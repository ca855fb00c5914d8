"""Legacy checkpoints go through the same engine: killed, resumed, shared by workers, checked again later."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.receipt import RECEIPT_NAME, read_receipt
from ckptbridge.converters.recheck import recheck
from tests.conftest import TinyFolders
from tests.converters.running import begin, planned
from tests.converters.test_legacy import assert_same, back, weights, write
from tests.converters.test_recheck import flip_a_bit

LAYOUT = ParallelLayout(tp=2, pp=2, ep=2, etp=1, first_stage_layers=1)


def files_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != RECEIPT_NAME
    }


def test_an_interrupted_conversion_is_resumed_to_the_same_bytes(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = tiny_folder("qwen2_moe")
    execute(planned(source, tmp_path / "whole", "torch", layout=LAYOUT))
    begin(planned(source, tmp_path / "torn", "torch", layout=LAYOUT))
    execute(planned(source, tmp_path / "torn", "torch", layout=LAYOUT, resume=True))
    assert files_of(tmp_path / "torn") == files_of(tmp_path / "whole")


def test_workers_and_little_memory_change_no_byte(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    plans = [
        planned(tiny_folder("mixtral"), tmp_path / str(workers), "torch", layout=LAYOUT, workers=workers, max_ram=ram)
        for workers, ram in ((1, 1 << 30), (4, 1 << 16))
    ]
    for plan in plans:
        execute(plan)
    assert files_of(plans[0].target) == files_of(plans[1].target)


def test_plans_in_another_dialect_are_other_plans(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    """What was begun with other names is not resumed with these."""
    begin(planned(tiny_folder("mixtral"), tmp_path / "torn", "torch", layout=LAYOUT))
    with pytest.raises(BadInputError, match="other options"):
        execute(
            planned(
                tiny_folder("mixtral"), tmp_path / "torn", "torch", layout=LAYOUT, legacy_names="local", resume=True
            )
        )


@pytest.mark.parametrize("name", ["llama_tied", "qwen2_moe"])
def test_a_flipped_bit_is_found_by_rank_and_name(name: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    layout = replace(LAYOUT, ep=1, etp=None) if name == "llama_tied" else LAYOUT
    options = ConvertOptions(layout=layout, workers=1)
    execute(plan_conversion(open_model(tiny_folder(name)), tmp_path / "torch", "torch", options))
    receipt = read_receipt(tmp_path / "torch")
    model = open_model(tmp_path / "torch")
    assert recheck(model, receipt).passed
    for label in list(model.sources)[1::19]:
        flip_a_bit(model.sources[label])
        found = recheck(open_model(tmp_path / "torch"), receipt)
        assert found.changed == (label,)
        assert not found.passed
        flip_a_bit(model.sources[label])


def test_the_receipt_names_the_legacy_source(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    made = write(tiny_folder("llama"), tmp_path / "torch", tp=2, pp=2)
    assert_same(weights(tiny_folder("llama")), back(made, tmp_path / "hf"))
    receipt = read_receipt(tmp_path / "hf")
    assert "mp_rank_01_001:decoder.layers.1.mlp.linear_fc1.weight" in receipt.source_tensors
    assert all(receipt.source_tensors.values())
    result = recheck(open_model(made), receipt)
    assert result.passed
    assert result.side == "source"
