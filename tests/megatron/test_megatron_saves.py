"""What the real megatron-core saves, under every layout, becomes a Hugging Face model that computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptbridge.converters.convert import plan_conversion
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import open_model
from tests.conftest import TinyFolders
from tests.megatron.cases import SAVES
from tests.megatron.conftest import Cases, Done, Report
from tests.megatron.launch import Layout
from tests.tiny import TINY, VOCAB_SIZE, reference_logits

pytestmark = [pytest.mark.mcore, pytest.mark.xdist_group("megatron")]

TOLERANCE = 1e-5


def check(saved: Done, target: Path, report: Report, hf_config: Path | None = None) -> None:
    """Convert what was saved, and compare transformers' logits with those that megatron-core computed."""
    assert not saved.result.error, saved.result.error
    source = open_model(saved.case.folder, hf_config=hf_config)
    assert source.iteration == 7
    execute(plan_conversion(source, target, "hf"))
    logits, expected = reference_logits(target, saved.case.tokens), saved.result.logits
    assert expected is not None
    if hf_config is not None:
        assert logits.shape[-1] == VOCAB_SIZE  # the config tells which rows are padding
    difference = (logits - expected[..., : logits.shape[-1]]).abs().max().item()
    report("max_abs_diff", difference)
    assert difference <= TOLERANCE


@pytest.mark.parametrize(("model", "layout"), SAVES, ids=str)
def test_transformers_computes_what_megatron_saved(
    megatron: Cases,
    record_property: Report,
    tiny_folder: TinyFolders,
    tmp_path: Path,
    model: str,
    layout: Layout,
) -> None:
    check(megatron["save", model, str(layout)], tmp_path / "hf", record_property, tiny_folder(model))


@pytest.mark.parametrize("model", TINY)
def test_arguments_alone_describe_what_megatron_saved(
    megatron: Cases, record_property: Report, tmp_path: Path, model: str
) -> None:
    check(megatron["save", model, "tp2"], tmp_path / "hf", record_property)


def test_local_names_are_read(
    megatron: Cases, record_property: Report, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    check(megatron["save local names",], tmp_path / "hf", record_property, tiny_folder("qwen3_moe"))
