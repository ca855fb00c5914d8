"""Recompute and offload: the same losses and gradients bit for bit, less kept, nothing computed more than told."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ckptbridge.converters.model import decoder_tensors, open_model
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.kernels.main_gradient import main_gradient_of
from ckptbridge.trainer.activation_memory import spare_memory
from ckptbridge.trainer.decoder import Decoder
from ckptbridge.trainer.loading import empty_decoder, load_weights
from ckptbridge.trainer.offload import Offload
from ckptbridge.trainer.optimizer import Optimizer
from ckptbridge.trainer.recipe import OptimizerSection
from ckptbridge.trainer.recompute import forgetting, recomputed
from ckptbridge.trainer.step import accumulate_gradients
from tests.conftest import TinyFolders
from tests.tiny import token_ids

MODELS = ["llama", "mixtral", "qwen2_moe", "gemma2", "deepseek_v3"]
WAYS = {
    "selective": {"recompute": "selective", "offload": False},
    "full": {"recompute": "full", "offload": False},
    "offload": {"recompute": "none", "offload": True},
    "selective and offload": {"recompute": "selective", "offload": True},
}


def loaded(folder: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> Decoder:
    model = open_model(folder)
    backend = "triton" if device.type == "cuda" else "reference"
    decoder = empty_decoder(model.config, backend, dtype, device)
    load_weights(decoder, decoder_tensors(model.tensors, model.config))
    return decoder


def trained(decoder: Decoder) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of two micro-batches."""
    batch = token_ids(4).to(decoder.output_weight_VH.device)
    result = accumulate_gradients(decoder, batch, 2, 0.01)
    return result.loss, {n: p.grad for n, p in decoder.named_parameters() if p.grad is not None}


def are_same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit on a CPU. On a GPU the backward pass of attention may add in another order each time."""
    if not one.is_cuda:
        return torch.equal(one, other)
    return bool((one - other).abs().max() <= 2**-6 * one.abs().max())


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_stay_what_they_are(
    name: str, way: str, tiny_folder: TinyFolders, device: torch.device
) -> None:
    plain, spared = (loaded(tiny_folder(name), device) for _ in range(2))
    host = spare_memory(spared, **WAYS[way], least_bytes=1)
    for _ in range(2):
        (loss, expected), (spared_loss, found) = trained(plain), trained(spared)
        assert torch.equal(loss, spared_loss)
        assert expected.keys() == found.keys()
        assert [key for key, gradient in expected.items() if not are_same(gradient, found[key])] == []
    if host is not None:
        assert host.host_bytes > 0
        made = host.host_bytes
        trained(spared)
        assert host.host_bytes == made, "a buffer of the host was not given back"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama_tied", "mixtral"])
def test_main_gradients_get_each_contribution_once(
    name: str, way: str, tiny_folder: TinyFolders, device: torch.device
) -> None:
    plain, spared = (loaded(tiny_folder(name), device, torch.bfloat16) for _ in range(2))
    gradients: list[dict[str, Tensor]] = []
    for decoder in (plain, spared):
        Optimizer(decoder, OptimizerSection())
        if decoder is spared:
            spare_memory(decoder, **WAYS[way], least_bytes=1)
        trained(decoder)
        gradients.append({n: main_gradient_of(p).finish().clone() for n, p in decoder.named_parameters()})
    for key, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, key
        assert are_same(gradient, gradients[1][key]), key


def test_a_forgotten_result_is_made_once_for_all_who_want_it() -> None:
    calls: list[int] = []

    def doubled(x: Tensor) -> Tensor:
        calls.append(1)
        return _Double.apply(x)

    x = torch.randn(3, 4, requires_grad=True)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    with forgetting(pack, lambda tensor: tensor):
        made = recomputed(doubled, x)
        out = (made * made).sum() + (made.view(12) ** 3).sum()
    address = made.data_ptr()
    assert len(calls) == 1
    assert address not in [tensor.data_ptr() for tensor in packed], "the result was kept all the same"
    out.backward()
    assert len(calls) == 2
    assert torch.allclose(x.grad, 2 * (2 * 2 * x + 3 * (2 * x) ** 2))


def test_what_was_written_into_is_not_taken_for_the_result() -> None:
    x = torch.randn(4, requires_grad=True)
    with forgetting(lambda tensor: tensor, lambda tensor: tensor):
        made = recomputed(_Double.apply, x)
        made = made.add_(1)
        out = (made * made).sum()
    out.backward()
    assert torch.allclose(x.grad, 2 * 2 * (2 * x + 1))


def test_outside_of_forgetting_nothing_happens() -> None:
    x = torch.randn(4, requires_grad=True)
    assert torch.equal(recomputed(_Double.apply, x), 2 * x)


class _Double(torch.autograd.Function):
    """An operation that keeps nothing of its own."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return 2 * grad


def layer_calls(decoder: Decoder) -> Callable[[], int]:
    calls: list[int] = []
    for layer in decoder.decoder.layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    return lambda: len(calls)


@pytest.mark.parametrize(("way", "times"), [("selective", 1), ("full", 2), ("offload", 1)])
def test_layers_run_as_often_as_told(way: str, times: int, tiny_folder: TinyFolders, device: torch.device) -> None:
    decoder = loaded(tiny_folder("mixtral"), device)
    spare_memory(decoder, **WAYS[way], least_bytes=1)
    count = layer_calls(decoder)
    trained(decoder)
    assert count() == 2 * times * len(decoder.decoder.layers)


def test_offloaded_activations_leave_the_gpu(tiny_folder: TinyFolders) -> None:
    """On a CPU both sides are one memory; what can be seen there is that every layer but the last sends its own."""
    decoder = loaded(tiny_folder("llama"), torch.device("cpu"))
    host = spare_memory(decoder, recompute="none", offload=True, least_bytes=1)
    assert host is not None
    trained(decoder)
    layers = len(decoder.decoder.layers)
    by_layer = host.host_bytes / (layers - 1)
    tokens, hidden = token_ids(2)[:, 1:].numel(), decoder.config.hidden_size
    assert by_layer >= 4 * 4 * tokens * hidden


class _KeepsForNothing(torch.autograd.Function):
    """An operation that keeps its input and never asks for it."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad.clone()


def two_layers(x: Tensor, weight: Tensor, offload: Offload | None) -> None:
    """Backward through two layers; of the first, half of what is kept is dropped, and one tensor never asked for."""

    def run(number: int, layer: Callable[[Tensor], list[Tensor]], x: Tensor) -> list[Tensor]:
        if offload is None:
            return layer(x)
        with offload.layer(number) as tensors, saved_tensors_hooks(tensors.pack, tensors.unpack):
            return layer(x)

    def first(x: Tensor) -> list[Tensor]:
        product = x @ weight
        return [_KeepsForNothing.apply(2 * product), *(product.mul(number).exp() for number in range(3))]

    def second(x: Tensor) -> list[Tensor]:
        for _ in range(6):
            x = x.sin()
        return [x]

    (out,) = run(1, second, run(0, first, x)[0])
    out.sum().backward()


def test_what_no_gradient_reaches_is_not_brought_back(device: torch.device) -> None:
    """Nor does a copy write into memory that was let go: on a GPU the second layer's gradients would stand there."""
    size = 2048 if device.type == "cuda" else 8
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, size, generator=generator).to(device)
    plain, spared = (torch.full((size, size), 1 / size, device=device, requires_grad=True) for _ in range(2))
    offload = Offload([spared], 2, least_bytes=1)
    for step in range(1, 4):
        two_layers(x, plain, None)
        two_layers(x, spared, offload)
        assert torch.equal(plain.grad, spared.grad)
        assert offload.host_bytes == 5 * x.nbytes
        assert offload.loaded_bytes == step * 2 * x.nbytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_an_offloaded_step_takes_less_of_the_gpu() -> None:
    """Eight dense layers of 16,384 tokens: two layers' activations are on the GPU at a time instead of eight's."""
    config = ModelConfig(
        num_layers=8,
        hidden_size=1024,
        ffn_hidden_size=4096,
        num_attention_heads=8,
        num_query_groups=8,
        kv_channels=128,
        vocab_size=1024,
    )
    batch = torch.randint(0, 1024, (4, 4097), device="cuda")
    peaks, losses = [], []
    for offload in (False, True):
        decoder = empty_decoder(config, "triton", torch.bfloat16, torch.device("cuda"))
        with torch.no_grad():
            torch.manual_seed(0)
            for parameter in decoder.parameters():
                parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
        Optimizer(decoder, OptimizerSection())
        host = spare_memory(decoder, recompute="none", offload=offload)
        accumulate_gradients(decoder, batch, 4, 0.0)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        losses.append(accumulate_gradients(decoder, batch, 4, 0.0).loss.item())
        peaks.append(torch.cuda.max_memory_allocated() - before)
        if host is not None:
            assert host.host_bytes > 3 << 30
        del decoder, host
        gc.collect()
    assert losses[0] == losses[1]
    assert peaks[1] < 0.6 * peaks[0]
