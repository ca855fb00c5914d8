"""Whole models: the main gradients of an optimizer are what autograd alone sums up, for every parameter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ckptbridge.converters.model import decoder_tensors, open_model
from ckptbridge.kernels.main_gradient import MainGradient, main_gradient_of
from ckptbridge.trainer.decoder import Decoder
from ckptbridge.trainer.loading import empty_decoder, load_weights
from ckptbridge.trainer.optimizer import Optimizer
from ckptbridge.trainer.recipe import OptimizerSection
from ckptbridge.trainer.step import accumulate_gradients
from tests.conftest import TinyFolders
from tests.tiny import token_ids

# Tied and untied heads, biases, q and k norms, LayerNorm, latent attention with further layers and an expert bias,
# shared experts with and without a scale, biases of experts, multipliers, sinks.
MODELS = ["llama_tied", "qwen2_moe", "qwen3_moe", "deepseek_v3", "granite_moe", "gpt_oss", "nemotron"]


def decoder_of(name: str, dtype: torch.dtype, tiny_folder: TinyFolders, device: str) -> Decoder:
    model = open_model(tiny_folder(name))
    backend = "triton" if device == "cuda" else "reference"
    decoder = empty_decoder(model.config, backend, dtype, torch.device(device))
    load_weights(decoder, decoder_tensors(model.tensors, model.config))
    return decoder


def gradients(decoder: Decoder) -> dict[str, Tensor | None]:
    accumulate_gradients(decoder, token_ids(batch=4).to(decoder.output_weight_VH.device), 2, 1e-2)
    found: dict[str, Tensor | None] = {}
    for name, parameter in decoder.named_parameters():
        main = main_gradient_of(parameter)
        if main is not None:
            assert parameter.grad is None, name
            assert main.is_filled, f"{name}: nothing contributed"
        found[name] = parameter.grad if main is None else main.finish().clone()
    return found


def check_main_gradients(name: str, dtype: torch.dtype, tiny_folder: TinyFolders, device: str = "cpu") -> None:
    plain, trained = (decoder_of(name, dtype, tiny_folder, device) for _ in range(2))
    Optimizer(trained, OptimizerSection())
    ours, autograds = gradients(trained), gradients(plain)
    # Two micro-batches, each summed in another order; in bf16 autograd rounds each gradient and their sum.
    tolerance = 1e-5 if dtype == torch.float32 else 2.0**-6
    for key, expected in autograds.items():
        found = ours[key]
        if expected is None or found is None:
            assert found is expected, key
            assert not trained.get_parameter(key).requires_grad, key
            continue
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() <= tolerance * expected.abs().max(), key


@pytest.mark.parametrize("name", MODELS)
def test_main_gradients_equal_autograds(name: str, tiny_folder: TinyFolders) -> None:
    check_main_gradients(name, torch.float32, tiny_folder)


def test_main_gradients_equal_autograds_in_bf16(tiny_folder: TinyFolders) -> None:
    check_main_gradients("llama_tied", torch.bfloat16, tiny_folder)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama_tied", "mixtral", "qwen2_moe", "qwen3_moe"])
def test_main_gradients_equal_autograds_on_a_gpu(name: str, dtype: torch.dtype, tiny_folder: TinyFolders) -> None:
    check_main_gradients(name, dtype, tiny_folder, "cuda")


def test_the_comparison_sees_a_micro_batch_that_is_lost(
    tiny_folder: TinyFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    def target(self: MainGradient) -> tuple[Tensor, bool]:
        self.is_filled = True
        return self.tensor, False

    monkeypatch.setattr(MainGradient, "target", target)
    with pytest.raises(AssertionError, match="weight"):
        check_main_gradients("llama_tied", torch.float32, tiny_folder)
