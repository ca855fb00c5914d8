"""embedding: the gradient of its weight against fp64, the same bits every time, and an oracle that sees faults."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ckptbridge.kernels.embedding import EmbeddingConfig, embedding
from ckptbridge.kernels.main_gradient import MainGradient, set_main_gradient
from tests.kernels.cases import FP32, random_tensor
from tests.kernels.cases_embedding import REAL_EMBEDDING, SMALL_EMBEDDING, EmbeddingCase
from tests.kernels.poison import poisoned_memory
from tests.kernels.tolerances import FP32 as UNIT
from tests.kernels.tolerances import assert_close

CASES = SMALL_EMBEDDING + (REAL_EMBEDDING if torch.cuda.is_available() else [])


def embedding_inputs(case: EmbeddingCase, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, weight and the gradient of the rows."""
    generator = torch.Generator(device).manual_seed(case.T)
    tokens = torch.randint(case.used or case.V, (case.T,), generator=generator, device=device)
    weight = random_tensor((case.V, case.H), case.dtype, generator).requires_grad_()
    return tokens, weight, random_tensor((case.T, case.H), case.dtype, generator)


@poisoned_memory()
def check_embedding(
    operation: Callable[[Tensor, Tensor], Tensor], case: EmbeddingCase, device: torch.device, *, main: str = ""
) -> None:
    """Rows and the weight's gradient; `main`: into a main gradient that is `new`, or `filled` with something."""
    tokens, weight, d_out = embedding_inputs(case, device)
    held = 0.0
    if main:
        set_main_gradient(weight, summed := MainGradient(torch.full(weight.shape, float("nan"), device=device)))
        if main == "filled":
            held = 0.5
            summed.add(torch.full(weight.shape, held, device=device))
    rows = operation(tokens, weight)
    assert torch.equal(rows, weight.detach()[tokens]), "rows"
    rows.backward(d_out)
    assert main == "" or weight.grad is None, "the weight has a gradient beside its main gradient"
    found = summed.finish() if main else weight.grad
    assert found.dtype == (torch.float32 if main else case.dtype), f"dweight: {found.dtype}"
    expected = torch.zeros(weight.shape, dtype=torch.float64, device=device).index_add_(0, tokens, d_out.double())
    size = torch.zeros_like(expected).index_add_(0, tokens, d_out.double().abs())
    assert_close("dweight", found, expected + held, roundings=1, noise=UNIT * math.sqrt(case.T) * (size + 2 * held))


@pytest.mark.parametrize("main", ["", "new", "filled"], ids=["own", "new", "filled"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_equals_fp64(case, main, device):
    check_embedding(partial(embedding, backend="triton"), case, device, main=main)


def test_other_launch_knobs_give_the_same_numbers(device):
    config = EmbeddingConfig(block_tokens=4, block_width=16, num_warps=1)
    check_embedding(partial(embedding, backend="triton", config=config), EmbeddingCase(T=40, V=7, H=40), device)


@pytest.mark.parametrize("main", ["", "new", "filled"], ids=["own", "new", "filled"])
def test_a_cpu_sums_bf16_in_fp32(main, device):
    """4,096 places of one word: torch's own sum in bf16 would stop to grow at 256 times the mean."""
    case = EmbeddingCase(T=4096, V=2, H=8, used=1)
    cpu = torch.device("cpu")
    check_embedding(partial(embedding, backend="reference"), case, cpu, main=main)
    if main == "":
        with pytest.raises(AssertionError, match="dweight"):
            check_embedding(F.embedding, case, cpu)


def test_reference_is_torchs_own(device):
    tokens, weight, _ = embedding_inputs(EmbeddingCase(T=8, V=5, H=4, dtype=FP32), device)
    rows = embedding(tokens.view(2, 4), weight)
    assert rows.shape == (2, 4, 4)
    assert torch.equal(rows, F.embedding(tokens.view(2, 4), weight))


def test_leading_dimensions_an_expanded_gradient_and_the_same_bits(device):
    tokens, weight, _ = embedding_inputs(EmbeddingCase(T=60, V=5, H=33, dtype=FP32), device)
    tokens = tokens.view(3, 20)
    gradients = [torch.autograd.grad(embedding(tokens, weight, backend="triton").sum(), weight)[0] for _ in range(2)]
    assert torch.equal(*gradients)
    assert torch.equal(gradients[0][:, 0], tokens.flatten().bincount(minlength=5).float())


def test_no_gradient_is_wanted(device):
    tokens, weight, _ = embedding_inputs(EmbeddingCase(T=8, V=5, H=4), device)
    assert not embedding(tokens, weight.detach(), backend="triton").requires_grad


# Planted faults: each computes something else than the definition, and the oracle must say so.


def _last_place_missing(tokens, weight):
    rows = F.embedding(tokens, weight)
    return torch.cat([rows[:-1], rows[-1:].detach()])


def _places_of_a_word_counted_once(tokens, weight):
    is_again = (tokens[:, None] == tokens).tril(-1).any(1)
    rows = F.embedding(tokens, weight)
    return torch.where(is_again[:, None], rows.detach(), rows)


def _gradient_of_another_word(tokens, weight):
    other = F.embedding((tokens + 1) % len(weight), weight)
    return weight.detach()[tokens] + (other - other.detach())


@pytest.mark.parametrize("fault", [_last_place_missing, _places_of_a_word_counted_once, _gradient_of_another_word])
def test_oracle_catches(fault, device):
    case = EmbeddingCase(T=64, V=5, H=24, dtype=FP32)
    check_embedding(F.embedding, case, device)
    with pytest.raises(AssertionError, match="dweight"):
        check_embedding(fault, case, device)


def test_arguments_that_do_not_fit():
    tokens, weight = torch.zeros(4, dtype=torch.long), torch.zeros(5, 8)

    def refused(match: str, *arguments, **keywords):
        with pytest.raises(ValueError, match=match):
            embedding(*arguments, **keywords)

    refused(r"weight_VH: expected dtype torch.float32 or torch.bfloat16, found torch.float16", tokens, weight.half())
    refused(r"weight_VH: expected \[V, H\], found shape \(40,\)", tokens, weight.flatten())
    refused(r"tokens: expected torch.int64 on cpu, found torch.int32 on cpu", tokens.int(), weight)
    refused(r"backend: expected one of reference, .* found 'cuda'", tokens, weight, backend="cuda")
