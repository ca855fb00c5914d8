"""The same trainer on a GPU: the CPU's numbers with either kernels, and a bf16 run that is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ckptbridge.converters.model import decoder_tensors, open_model
from ckptbridge.kernels.backend import Backend
from ckptbridge.trainer.decoder import Decoder
from ckptbridge.trainer.grouped_linear import grouped_linear
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
    assert results[0].loss.item() == pytest.approx(results[1].loss.item(), abs=1e-5)
    loads = [{layer: load_E.tolist() for layer, load_E in result.expert_load.items()} for result in results]
    assert loads[0] == loads[1]
    for (key, a), b in zip(cpu.named_parameters(), gpu.parameters(), strict=True):
        assert (a.grad - b.grad.cpu()).abs().max() <= 1e-4 * a.grad.abs().max(), key


GROUPS = {
    "even": [64] * 8,
    "ragged": [1, 200, 7, 0, 63, 130, 0, 111],
    "one takes all": [0, 0, 512, 0, 0, 0, 0, 0],
    "the first and the last are empty": [0, 100, 3, 9, 200, 100, 100, 0],
}


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("rows", GROUPS.values(), ids=GROUPS.keys())
def test_one_launch_is_a_product_an_expert(rows: list[int], backend: Backend) -> None:
    """In bf16 against fp64: the output's rounding, 2**-8, and that of sums of some hundred products."""
    inputs, outputs = 96, 40
    generator = torch.Generator("cuda").manual_seed(1)
    x, weight, grad = (
        torch.randn(shape, generator=generator, device="cuda").bfloat16()
        for shape in ((sum(rows), inputs), (len(rows), outputs, inputs), (sum(rows), outputs))
    )
    x, weight = x.requires_grad_(), weight.requires_grad_()
    poison = [torch.full((1 << 22,), float("nan"), device="cuda") for _ in range(4)]
    del poison  # what nobody writes shows
    ends = torch.tensor(rows, device="cuda").cumsum(0, dtype=torch.int32)
    made = [*torch.autograd.grad(out := grouped_linear(x, weight, ends, backend), (x, weight), grad), out]
    wide_x, wide_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    parts = [part @ matrix.T for part, matrix in zip(wide_x.split(rows), wide_weight, strict=True)]
    expected = [*torch.autograd.grad(torch.cat(parts), (wide_x, wide_weight), grad.double()), torch.cat(parts)]
    for one, other in zip(made, expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert torch.linalg.vector_norm(one.double() - other) <= 2**-8 * torch.linalg.vector_norm(other)


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
    assert "one CUDA graph" in result.notes[0]
    assert "Planned memory" in result.notes[1]
    assert result.held_out_after < result.held_out_before - 0.5
    assert [record["step"] for record in read_log(result.log)] == list(range(21))
