"""A layer's fused operations together, on a GPU: as exact as plain bf16, and never waited for by the host."""

from __future__ import annotations

import pytest
import torch

from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.kernels.main_gradient import MainGradient, set_main_gradient
from ckptbridge.trainer.decoder import Decoder
from ckptbridge.trainer.loading import empty_decoder
from ckptbridge.trainer.step import accumulate_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=256,
    ffn_hidden_size=384,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=64,
    vocab_size=500,
)
CONFIGS = {
    "llama": {},
    "tied": {"share_embeddings_and_output_weights": True},
    "qwen3": {"qk_layernorm": True, "add_qkv_bias": True},
    "half of a head turns": {"rotary_percent": 0.5},
    "a window": {"window_size": 40},
    "wide heads": {"kv_channels": 192},
}


def decoder_of(changed: dict[str, object], backend: str, dtype: torch.dtype, device: str) -> Decoder:
    """Random weights, the same ones each time, rounded to bf16 whatever the dtype."""
    values = {field: getattr(CONFIG, field) for field in ModelConfig.__dataclass_fields__} | changed
    decoder = empty_decoder(ModelConfig(**values), backend, dtype, torch.device(device))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.ndim == 1 else 0.06)
            parameter.copy_((drawn + ("norm" in name)).bfloat16())
    return decoder


def tokens(device: str) -> torch.Tensor:
    """Four sequences of 96 tokens and one more."""
    return torch.randint(500, (4, 97), generator=torch.Generator().manual_seed(1)).to(device)


def loss_and_gradients(decoder: Decoder, *, main: bool = False) -> tuple[float, torch.Tensor]:
    """Of two micro-batches; gradients of all parameters in one row, in fp64 on the CPU."""
    parameters = list(decoder.parameters())
    sums = [MainGradient(torch.full_like(p, float("nan"), dtype=torch.float32)) for p in parameters]
    if main:
        for parameter, summed in zip(parameters, sums, strict=True):
            set_main_gradient(parameter, summed)
    result = accumulate_gradients(decoder, tokens(str(parameters[0].device)), 2, 0.0)
    gradients = [
        summed.finish() if summed.is_filled else parameter.grad
        for parameter, summed in zip(parameters, sums, strict=True)
    ]
    return float(result.loss), torch.cat([gradient.double().cpu().flatten() for gradient in gradients])


@pytest.mark.parametrize("main", [False, True], ids=["own", "main"])
@pytest.mark.parametrize("changed", CONFIGS.values(), ids=CONFIGS.keys())
def test_as_exact_as_plain_bf16(changed: dict[str, object], main: bool) -> None:
    """Against fp32 on a CPU the fused path may be off by as much as bf16 on a CPU is, and half as much again."""
    loss, gradients = loss_and_gradients(decoder_of(changed, "reference", torch.float32, "cpu"))
    _, plain = loss_and_gradients(decoder_of(changed, "reference", torch.bfloat16, "cpu"))
    fused_loss, fused = loss_and_gradients(decoder_of(changed, "triton", torch.bfloat16, "cuda"), main=main)
    allowed = torch.linalg.vector_norm(plain - gradients)
    assert allowed < 0.1 * torch.linalg.vector_norm(gradients)
    assert torch.linalg.vector_norm(fused - gradients) <= 1.5 * allowed
    assert fused_loss == pytest.approx(loss, rel=2**-8)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.parametrize("changed", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_host_never_waits(changed: dict[str, object]) -> None:
    """A step's passes read nothing from the device once kernels are compiled and tables made."""
    decoder = decoder_of(changed, "triton", torch.bfloat16, "cuda")
    batch = tokens("cuda")
    accumulate_gradients(decoder, batch, 2, 0.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        accumulate_gradients(decoder, batch, 2, 0.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_same_bits_behind_attention() -> None:
    """Attention's own backward pass may add with atomics; no other operation does."""
    gradients = []
    for _ in range(2):
        decoder = decoder_of({}, "triton", torch.bfloat16, "cuda")
        for name, parameter in decoder.named_parameters():
            parameter.requires_grad_(name.startswith(("decoder.layers.1.mlp", "decoder.final", "output_layer")))
        accumulate_gradients(decoder, tokens("cuda"), 4, 0.0)
        gradients.append([p.grad for p in decoder.parameters() if p.requires_grad])
    assert all(map(torch.equal, *gradients))
