"""Attention's kernels: what a recipe may name, and on a GPU their numbers and that nothing is copied."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.model import open_model
from ckptbridge.trainer.attention import use_attention
from ckptbridge.trainer.attention_kernels import AttentionKernels, choose_attention
from ckptbridge.trainer.loading import empty_decoder
from tests.conftest import TinyFolders

CPU = torch.device("cpu")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_a_cpu_runs_what_torch_takes() -> None:
    assert choose_attention("auto", CPU).name == "auto"
    q, k, v = (torch.randn(2, heads, 9, 16) for heads in (4, 2, 2))
    out = [AttentionKernels(name).causal(q, k, v, 0.3) for name in ("auto", "math")]
    scores = (q @ k.repeat_interleave(2, 1).transpose(2, 3) * 0.3).masked_fill(~torch.ones(9, 9).tril().bool(), -1e9)
    for found in out:
        torch.testing.assert_close(found, scores.softmax(-1) @ v.repeat_interleave(2, 1))


@pytest.mark.parametrize("name", ["llama", "deepseek_v3_saved"])
def test_every_layer_of_plain_attention_takes_the_recipes_choice(name: str, tiny_folder: TinyFolders) -> None:
    """DeepSeek's latent attention too."""
    config = open_model(tiny_folder(name)).config
    decoder = empty_decoder(config, "reference", torch.float32, CPU)
    use_attention(decoder, AttentionKernels("math"))
    chosen = [module.kernels for module in decoder.modules() if hasattr(module, "kernels")]
    assert chosen == [AttentionKernels("math")] * config.num_layers


@pytest.mark.parametrize("name", ["cudnn", "flash", "flash3", "flash4"])
def test_a_gpus_kernels_are_refused_on_a_cpu(name: str) -> None:
    with pytest.raises(BadInputError, match=rf"kernels.attention: {name} runs on a GPU, .* use auto or math"):
        choose_attention(name, CPU)


@pytest.mark.parametrize(("name", "module"), [("flash3", "flash_attn_interface"), ("flash4", "flash_attn.cute")])
def test_a_missing_flash_attention_is_named(name: str, module: str) -> None:
    with pytest.raises(
        BadInputError, match=rf"{name} needs the module {module}, not installed; use one of auto, cudnn"
    ):
        choose_attention(name, torch.device("cuda", 0))


SHAPES = [(2, 512, 8, 2, 128), (1, 300, 6, 6, 64), (2, 257, 7, 1, 80), (1, 130, 4, 2, 256)]
CASES = [
    (name, *shape)
    for name in ("auto", "cudnn", "flash", "math")
    for shape in SHAPES
    if name != "cudnn" or shape[-1] <= 128  # cuDNN has no wider heads, and auto gives it none
]


def heads_of(B: int, S: int, N: int, G: int, D: int) -> tuple[list[Tensor], list[Tensor]]:
    """Queries, keys and values as they come from a packed product: [B, heads, S, D] views, of values with gaps."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").bfloat16()

    packed = draw(B, S, G, N // G + 2, D)
    leaves = [draw(B, S, N, D), draw(B, S, G, D), packed[:, :, :, -1]]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    return leaves, [leaf.transpose(1, 2) for leaf in leaves]


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(("name", "B", "S", "N", "G", "D"), CASES)
def test_kernels_equal_the_definition_in_fp64(name: str, B: int, S: int, N: int, G: int, D: int) -> None:
    """Norms of differences: bf16 rounds weights and output, 2**-8 each; the backward pass rounds differences too."""
    leaves, heads = heads_of(B, S, N, G, D)
    out = choose_attention(name, torch.device("cuda", 0)).causal(*heads, None)
    d_out = torch.randn(B, S, N, D, device="cuda").bfloat16().transpose(1, 2)
    found = [out, *torch.autograd.grad(out, leaves, d_out)]
    wide_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    q, k, v = (leaf.transpose(1, 2) for leaf in wide_leaves)
    k, v = (x.repeat_interleave(N // G, 1) for x in (k, v))
    scores = (q @ k.transpose(2, 3) / D**0.5).masked_fill(~torch.ones(S, S, device="cuda").tril().bool(), float("-inf"))
    expected = scores.softmax(-1) @ v
    expected_all = [expected, *torch.autograd.grad(expected, wide_leaves, d_out.double())]
    for allowed, actual, wide in zip((2**-7, *3 * (2**-6,)), found, expected_all, strict=True):
        assert torch.linalg.vector_norm(actual.double() - wide) <= allowed * torch.linalg.vector_norm(wide)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("name", ["auto", "cudnn", "flash"])
def test_nothing_is_copied_around_attention(name: str) -> None:
    """The output lies as [B, S, N, D], and so do gradients: what comes before and after takes them as they are."""
    leaves, heads = heads_of(2, 512, 8, 2, 128)
    out = choose_attention(name, torch.device("cuda", 0)).causal(*heads, None)
    assert out.transpose(1, 2).is_contiguous()
    gradients = torch.autograd.grad(out, heads, torch.ones_like(out))
    assert all(gradient.transpose(1, 2).is_contiguous() for gradient in gradients)
    assert leaves[2].stride(2) > leaves[2].shape[3]


@pytest.mark.gpu
@on_gpu
def test_auto_is_cudnn() -> None:
    _, heads = heads_of(2, 512, 8, 2, 128)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        expected = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
    found = AttentionKernels().causal(*heads, None)
    assert type(found.grad_fn) is type(expected.grad_fn)
    assert "Cudnn" in type(found.grad_fn).__name__
