"""The same trainer on a GPU: the CPU's numbers with either kernels, and a bf16 run that is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ckptbridge.converters.model import decoder_tensors, open_model
from ckptbridge.trainer.decoder import Decoder
from ckptbridge.trainer.loading import empty_decoder, load_weights
from ckptbridge.trainer.log import read_log
from ckptbridge.trainer.loop import train
from ckptbridge.trainer.recipe_file import parse_recipe
from ckptbridge.trainer.step import accumulate_gradients
from tests.conftest import TinyFolders
from tests.tiny import save_tiny, token_ids
from tests.trainer.text import save_tokenizer, write_documents

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def loaded(folder: Path, backend: str, device: str) -> Decoder:
    model = open_model(folder)
    decoder = empty_decoder(model.config, backend, torch.float32, torch.device(device))
    load_weights(decoder, decoder_tensors(model.tensors, model.config))
    return decoder


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", ["mistral", "mixtral", "qwen2_moe", "qwen3_moe"])
def test_fp32_loss_and_gradients_equal_the_cpu(name: str, backend: str, tiny_folder: TinyFolders) -> None:
    """Logits move by 1e-5 at most; gradients by 1e-4 of the largest one, as between CPU and transformers."""
    batch = token_ids()
    cpu = loaded(tiny_folder(name), "reference", "cpu")
    gpu = loaded(tiny_folder(name), backend, "cuda")
    with torch.no_grad():
        logits = [d.logits(d(batch.to(d.output_weight_VH.device)).hidden_BSH).cpu() for d in (cpu, gpu)]
    assert (logits[0] - logits[1]).abs().max() <= 1e-5
    results = [accumulate_gradients(d, batch.to(d.output_weight_VH.device), 1, 0.01) for d in (cpu, gpu)]
    assert results[0].loss == pytest.approx(results[1].loss, abs=1e-5)
    assert results[0].expert_load == results[1].expert_load
    for (key, a), b in zip(cpu.named_parameters(), gpu.parameters(), strict=True):
        assert (a.grad - b.grad.cpu()).abs().max() <= 1e-4 * a.grad.abs().max(), key


def test_a_bf16_run_learns_and_resumes(tmp_path: Path) -> None:
    save_tiny("qwen3_moe", tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    write_documents(tmp_path / "texts")
    values: dict[str, Any] = {
        "run_folder": str(tmp_path / "run"),
        "model": {"init_from": str(tmp_path / "model")},
        "data": {"text": [str(tmp_path / "texts")], "sequence_length": 32, "held_out_fraction": 0.2},
        "optimizer": {"lr": 3e-3},
        "schedule": {"total_steps": 20},
        "checkpoint": {"save_every": 8},
        "precision": "bf16",
        "device": "cuda",
    }

    def interrupt(record: dict[str, Any]) -> None:
        if record["step"] == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(parse_recipe(values), interrupt)
    result = train(parse_recipe(values))
    assert result.resumed_from == 8
    assert "triton" in result.kernels
    assert result.held_out_after < result.held_out_before - 0.5
    assert [record["step"] for record in read_log(result.log)] == list(range(21))
