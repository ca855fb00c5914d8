"""Prompts are refused before they are read where no row of the router would come from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.model import open_model
from ckptbridge.converters.upcycling.spec import UpcycleSpec
from ckptbridge.trainer.upcycling.measure import measure_files
from tests.conftest import TinyFolders


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("llama", {"num_experts": 4}, "router_init random does not use; add --router-init hidden-state"),
        ("llama", {"num_experts": 4, "method": "cmoe"}, "router_init fitted does not use"),
        ("mixtral", {"num_experts": 3, "method": "prune"}, "method prune does not use; leave --prompts out"),
    ],
    ids=str,
)
def test_prompts_that_nothing_uses_are_refused(
    name: str, values: dict[str, Any], words: str, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    source, prompts = open_model(tiny_folder(name)), tmp_path / "prompts.yaml"
    with pytest.raises(BadInputError, match=words):
        measure_files(source, UpcycleSpec(**values), None, prompts)


def test_prompts_that_are_used_are_read(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source, spec = open_model(tiny_folder("llama")), UpcycleSpec(num_experts=4, router_init="hidden-state")
    with pytest.raises(BadInputError, match="there is no such file of prompts"):
        measure_files(source, spec, None, tmp_path / "prompts.yaml")
