"""The decoder computes of a mixture with copied experts what transformers computed of the one without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import open_model
from ckptbridge.converters.upcycling.construction import upcycled
from ckptbridge.converters.upcycling.spec import UpcycleSpec
from tests.conftest import TinyFolders
from tests.tiny import reference_logits, token_ids
from tests.trainer.test_every_family import LOGITS_TOLERANCE, decoder_logits


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("mixtral", {}),
        ("qwen3_moe_unnormalised", {}),
        ("deepseek_v2", {}),
        ("deepseek_v3", {}),
        ("gpt_oss", {}),
        ("glm4_moe_air", {"router_groups": True}),
    ],
    ids=str,
)
def test_the_decoder_finds_no_difference(
    name: str, values: dict[str, Any], tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    source = open_model(tiny_folder(name))
    spec = UpcycleSpec(num_experts=2 * (source.config.num_moe_experts or 0), method="expert-upcycling", **values)
    execute(plan_conversion(upcycled(source, spec), tmp_path / "mcore", "torch_dist", ConvertOptions(workers=1)))
    expected = reference_logits(tiny_folder(name), token_ids())
    assert (decoder_logits(tmp_path / "mcore") - expected).abs().max() <= LOGITS_TOLERANCE
