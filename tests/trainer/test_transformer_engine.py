"""The decoder on Transformer Engine's modules: the checkpoints, losses and gradients of the reference, in bf16.

Its bf16 rounds in other places than ours. So both are compared with the reference in fp32, and it may be as far away as
the reference in bf16 is, times three: two roundings of one size differ by less.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ckptbridge.converters.model import decoder_tensors, open_model
from ckptbridge.kernels.backend import obstacle
from ckptbridge.kernels.main_gradient import MainGradient, main_gradient_of, set_main_gradient
from ckptbridge.trainer.decoder import Decoder
from ckptbridge.trainer.loading import empty_decoder, load_weights
from ckptbridge.trainer.log import read_log
from ckptbridge.trainer.loop import train
from ckptbridge.trainer.recipe_file import parse_recipe
from ckptbridge.trainer.step import accumulate_gradients
from ckptbridge.trainer.verify import TOLERANCES
from tests.conftest import TinyFolders
from tests.tiny import save_tiny, token_ids
from tests.trainer.text import save_tokenizer, write_documents

WHY_NOT = obstacle("transformer_engine", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    pytest.mark.filterwarnings("default"),  # Transformer Engine has warnings of its own
]

NAMES = ["llama", "llama_tied", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe"]
Result = tuple[float, dict[str, Tensor]]


def loaded(folder: Path, backend: str, dtype: torch.dtype) -> Decoder:
    model = open_model(folder)
    decoder = empty_decoder(model.config, backend, dtype, torch.device("cuda"))
    load_weights(decoder, decoder_tensors(model.tensors, model.config))
    for parameter in decoder.parameters():
        poison = torch.full_like(parameter, float("nan"), dtype=torch.float32)
        set_main_gradient(parameter, MainGradient(poison))
    return decoder


def result_of(decoder: Decoder) -> Result:
    """The loss and every summed gradient of two micro-batches: the first overwrites, the second adds."""
    loss = accumulate_gradients(decoder, token_ids().cuda(), 1, 0.01).loss.item()
    gradients = {}
    for name, parameter in decoder.named_parameters():
        main = main_gradient_of(parameter)
        assert main is not None
        if parameter.grad is not None:  # of norms and biases autograd keeps it
            main.add(parameter.grad)
        if main.is_filled:
            gradients[name] = main.tensor
    return loss, gradients


def faults(found: Result, expected: Result, yardstick: Result) -> list[str]:
    """What is further from `expected` than rounding explains."""
    told = [] if abs(found[0] - expected[0]) <= TOLERANCES[torch.bfloat16] else [f"loss {found[0]}, not {expected[0]}"]
    told += [f"gradient of {name} on one side only" for name in found[1].keys() ^ expected[1].keys()]
    for name, wide in expected[1].items():
        if name not in found[1]:
            continue
        error, allowed = (torch.linalg.vector_norm(x[1][name] - wide).item() for x in (found, yardstick))
        scale = torch.linalg.vector_norm(wide).item()
        # A gradient that the yardstick happens to hit is rounded to bf16 in the end: 2**-8.
        if not error <= 3 * max(allowed, 2**-8 * scale):
            told.append(f"{name}: off by {error / scale:.1e}, the reference in bf16 by {allowed / scale:.1e}")
    return told


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_are_the_references(name: str, tiny_folder: TinyFolders) -> None:
    folder = tiny_folder(name)
    expected, yardstick = (result_of(loaded(folder, "reference", dtype)) for dtype in (torch.float32, torch.bfloat16))
    decoder = loaded(folder, "transformer_engine", torch.bfloat16)
    assert any("transformer_engine" in type(module).__module__ for module in decoder.modules())
    assert faults(result_of(decoder), expected, yardstick) == []


@pytest.mark.parametrize("weight", ["mlp.experts.experts.linear_fc1.weight", "self_attention.linear_qkv.weight"])
def test_a_planted_fault_is_found(weight: str, tiny_folder: TinyFolders) -> None:
    """gate_proj and up_proj, or two halves of the packed queries, keys and values, exchanged in one layer."""
    folder = tiny_folder("qwen3_moe")
    expected, yardstick = (result_of(loaded(folder, "reference", dtype)) for dtype in (torch.float32, torch.bfloat16))
    decoder = loaded(folder, "transformer_engine", torch.bfloat16)
    with torch.no_grad():
        parameter = decoder.get_parameter(f"decoder.layers.1.{weight}")
        parameter.copy_(parameter.roll(parameter.shape[-2] // 2, -2))
    assert len(faults(result_of(decoder), expected, yardstick)) > 5


def test_a_run_by_its_name(tmp_path: Path) -> None:
    """The trainer takes the recipe's word, learns what the triton backend learns, and exports a folder that opens."""
    save_tiny("qwen3_moe", tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    write_documents(tmp_path / "texts")
    losses: dict[str, list[float]] = {}
    for backend in ("triton", "transformer_engine"):
        values: dict[str, Any] = {
            "run_folder": str(tmp_path / backend),
            "model": {"init_from": str(tmp_path / "model")},
            "data": {"text": [str(tmp_path / "texts")], "sequence_length": 32, "held_out_fraction": 0.2},
            "optimizer": {"lr": 1e-3},
            "schedule": {"total_steps": 10},
            "kernels": {"backend": backend},
            "precision": "bf16",
            "device": "cuda",
        }
        result = train(parse_recipe(values))
        assert backend in result.kernels
        losses[backend] = [record["loss"] for record in read_log(result.log) if "loss" in record]
        assert result.hf is not None
        assert open_model(result.hf).config.num_moe_experts == 8
    ours, theirs = (torch.tensor(losses[backend]) for backend in ("triton", "transformer_engine"))
    assert ours[-1] < ours[0] - 0.1
    assert (ours - theirs).abs().max() <= 10 * TOLERANCES[torch.bfloat16]  # ten steps, each on the last one's weights
