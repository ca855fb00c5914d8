"""Our decoder on the converted side of every family, against transformers: fp32 logits."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.errors import NotSupportedError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import open_model
from ckptbridge.trainer.megatron.config import transformer_config
from tests.conftest import TinyFolders
from tests.tiny import reference_logits, token_ids
from tests.tiny_families import FURTHER
from tests.trainer.decoder_run import decoder_logits

LOGITS_TOLERANCE = 1e-5
"""Another order of summation costs up to 3e-6 of a logit in these models."""


@pytest.mark.parametrize("name", FURTHER)
def test_the_converted_side_computes_what_transformers_computes(
    name: str, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    execute(plan_conversion(open_model(tiny_folder(name)), tmp_path / "mcore", "torch_dist", ConvertOptions()))
    expected = reference_logits(tiny_folder(name), token_ids())
    assert (decoder_logits(tmp_path / "mcore") - expected).abs().max() <= LOGITS_TOLERANCE


@pytest.mark.parametrize("name", [name for name, model in FURTHER.items() if model.not_in_megatron])
def test_what_megatron_core_computes_otherwise_is_not_told_to_it(name: str, tiny_folder: TinyFolders) -> None:
    with pytest.raises(NotSupportedError, match="megatron-core"):
        transformer_config(open_model(tiny_folder(name)).config)
