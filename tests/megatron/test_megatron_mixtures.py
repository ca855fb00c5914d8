"""The real megatron-core loads mixtures with copied experts strictly, and gives the logits of those without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.upcycling.construction import upcycled
from ckptbridge.converters.upcycling.spec import UpcycleSpec
from ckptbridge.trainer.megatron.launch import Run, compute
from tests.conftest import TinyFolders
from tests.converters.test_upcycle_copies import with_config
from tests.megatron.launch import MEGATRON, check_fetched
from tests.tiny import reference_logits, token_ids

LOGITS_TOLERANCE = 1e-5


@pytest.mark.xdist_group("megatron")
@pytest.mark.parametrize(
    ("name", "values", "fields"),
    [
        ("mixtral", {}, {}),
        ("qwen2_moe", {}, {}),
        ("deepseek_v3", {}, {}),
        ("glm4_moe_air", {}, {}),
        # megatron-core ranks a group by its best top-k experts: by two, as the class, with a top-k of two.
        ("glm4_moe_air", {"router_groups": True}, {"num_experts_per_tok": 2}),
    ],
    ids=str,
)
def test_megatron_computes_what_fewer_experts_did(
    name: str,
    values: dict[str, Any],
    fields: dict[str, Any],
    tiny_folder: TinyFolders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_fetched()
    monkeypatch.syspath_prepend(str(MEGATRON))
    folder = with_config(tiny_folder(name), tmp_path / "source", **fields)
    source = open_model(folder)
    spec = UpcycleSpec(num_experts=2 * (source.config.num_moe_experts or 0), method="expert-upcycling", **values)
    execute(plan_conversion(upcycled(source, spec), tmp_path / "mcore", "torch_dist", ConvertOptions(workers=1)))
    ids_T = token_ids(batch=1)[0]
    expected_TV = reference_logits(folder, ids_T[None])[0]
    runs = [
        Run(model=open_model(tmp_path / "mcore"), layout=layout) for layout in (ParallelLayout(), ParallelLayout(ep=2))
    ]
    for done in compute(runs, ids_T, torch.float32, tmp_path):
        assert (done.missing_keys, done.unexpected_keys) == ((), ()), done.run.layout
        assert (done.logits_TV - expected_TV).abs().max() <= LOGITS_TOLERANCE, done.run.layout
