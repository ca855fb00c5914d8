"""Every family that the stock GPTModel can compute: the real megatron-core loads it strictly and gives its logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.trainer.megatron.launch import Run, compute
from tests.conftest import TinyFolders
from tests.megatron.launch import MEGATRON, check_fetched
from tests.tiny import EVERY, reference_logits, token_ids
from tests.tiny_families import FURTHER

COMPUTED = [name for name, model in FURTHER.items() if not model.not_in_megatron]
LOGITS_TOLERANCE = 1e-5


def layouts_of(name: str) -> list[ParallelLayout]:
    """One rank, and each way to cut."""
    mixture = [ParallelLayout(ep=2)] if EVERY[name].is_moe else []
    # megatron-core cuts no experts that have biases.
    etp = 1 if EVERY[name].hf_class == "GptOss" else None
    return [ParallelLayout(), ParallelLayout(tp=2, etp=etp), ParallelLayout(pp=2), *mixture]


@pytest.mark.xdist_group("megatron")
@pytest.mark.parametrize("name", COMPUTED)
def test_megatron_loads_strictly_and_computes_the_same(
    name: str, tiny_folder: TinyFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_fetched()
    monkeypatch.syspath_prepend(str(MEGATRON))
    options = ConvertOptions(layout=ParallelLayout(tp=2))
    execute(plan_conversion(open_model(tiny_folder(name)), tmp_path / "mcore", "torch_dist", options))
    model = open_model(tmp_path / "mcore")
    ids_T = token_ids(batch=1)[0]
    expected_TV = reference_logits(tiny_folder(name), ids_T[None])[0]
    runs = [Run(model=model, layout=layout) for layout in layouts_of(name)]
    for done in compute(runs, ids_T, torch.float32, tmp_path):
        assert (done.missing_keys, done.unexpected_keys) == ((), ()), done.run.layout
        assert (done.logits_TV - expected_TV).abs().max() <= LOGITS_TOLERANCE, done.run.layout
