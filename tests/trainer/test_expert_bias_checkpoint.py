"""A run whose expert biases move goes on bit for bit from its checkpoint, in which no state of them lies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ckptbridge.converters import training_checkpoint
from ckptbridge.converters.convert import ConvertOptions
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.reshard import plan_reshard
from ckptbridge.converters.training_checkpoint import load_training_checkpoint, save_training_checkpoint
from tests.conftest import TinyFolders
from tests.tiny import token_ids
from tests.trainer.test_expert_bias import run_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("saved", ["as it saves", "as it once saved", "in another layout"])
def test_a_run_goes_on_bit_for_bit(
    saved: str, dtype: torch.dtype, tiny_folder: TinyFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, optimizer, update = run_of("deepseek_v3", tiny_folder, dtype=dtype)
    for _ in range(2):
        update.take(token_ids(4), 1e-3)
    if saved == "as it once saved":  # with a state of every weight
        monkeypatch.setattr(training_checkpoint, "has_optimizer_state", lambda name: True)
    save_training_checkpoint(
        tmp_path / "run",
        model=open_model(tiny_folder("deepseek_v3")),
        iteration=2,
        weights={name: parameter.detach() for name, parameter in decoder.named_parameters()},
        optimizer=optimizer.state(),
        common={},
    )
    monkeypatch.undo()
    folder = tmp_path / "run"
    if saved == "in another layout":
        folder = tmp_path / "made"
        options = ConvertOptions(layout=ParallelLayout(tp=2, ep=2), workers=1)
        execute(plan_reshard(open_model(tmp_path / "run"), folder, "torch_dist", options))
    _, resumed, resumed_update = run_of("deepseek_v3", tiny_folder, dtype=dtype)
    resumed.load(load_training_checkpoint(folder).optimizer, 2)
    for _ in range(2):
        found, wanted = resumed.state(), optimizer.state()
        assert found.keys() == wanted.keys()
        for state, tensors in wanted.items():
            assert found[state].keys() == tensors.keys()
            assert not [name for name, tensor in tensors.items() if not torch.equal(found[state][name], tensor)]
        assert update.take(token_ids(4), 1e-3).loss == resumed_update.take(token_ids(4), 1e-3).loss
