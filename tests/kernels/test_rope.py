"""split_qkv: Hugging Face's numbers, the Triton kernels against fp64, and an oracle that sees planted faults."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ckptbridge.kernels.main_gradient import MainGradient, set_main_gradient
from ckptbridge.kernels.rope import SplitQkvConfig, rotate, split_qkv, split_qkv_reference
from tests.kernels.cases import BF16, FP32
from tests.kernels.cases_rope import REAL_SPLIT_QKV, SMALL_SPLIT_QKV, SplitQkvCase
from tests.kernels.oracle_rope import check_split_qkv, split_qkv_inputs

CASES = SMALL_SPLIT_QKV + (REAL_SPLIT_QKV if torch.cuda.is_available() else [])


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_reference_is_hugging_faces_bit_for_bit(dtype):
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    given = split_qkv_inputs(SplitQkvCase(S=5, G=2, per_group=3, D=16, dtype=dtype), torch.device("cpu"))
    norms = [Qwen3RMSNorm(16, eps=1e-6).to(dtype) for _ in range(2)]
    for norm, weight in zip(norms, given.weights, strict=True):
        norm.weight.data.copy_(weight.detach().to(dtype))
    q, k, v = given.qkv.detach().split((3, 1, 1), 3)
    cos, sin = (table.repeat(1, 2)[None] for table in (given.cos, given.sin))
    expected = apply_rotary_pos_emb(norms[0](q.flatten(2, 3)), norms[1](k.squeeze(3)), cos, sin, unsqueeze_dim=2)
    actual = split_qkv(given.qkv.detach(), given.cos, given.sin, norms[0].weight, norms[1].weight, 1e-6)
    assert all(map(torch.equal, actual, (*expected, v.squeeze(3))))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_equal_fp64(case, backend, device):
    check_split_qkv(partial(split_qkv, backend=backend), case, device, fused=backend == "triton")


@pytest.mark.slow  # torch.compile takes 10 to 75 s on two cores
# torch.compile's own import deprecates a function of torch.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_torch_backend_equals_fp64(device):
    check_split_qkv(partial(split_qkv, backend="torch"), SplitQkvCase(S=5, G=2, per_group=3, D=16), device, fused=False)


def test_other_launch_knobs_give_the_same_numbers(device):
    config = SplitQkvConfig(block_rows_forward=2, block_rows_backward=8, num_warps=2, programs_per_multiprocessor=1)
    case = SplitQkvCase(S=13, G=2, per_group=3, D=32, R=8)
    check_split_qkv(partial(split_qkv, backend="triton", config=config), case, device)


def test_repeated_backward_gives_the_same_bits(device):
    given = split_qkv_inputs(SplitQkvCase(S=40, G=2, per_group=3, D=32), device)
    outputs = split_qkv(*given.arguments, backend="triton")
    first, second = (torch.autograd.grad(outputs, given.leaves, given.d_outputs, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_gradients_of_any_layout_are_read(device):
    """Attention takes heads before positions, and gives gradients in that order."""
    given = split_qkv_inputs(SplitQkvCase(S=6, G=2, per_group=2, D=16, dtype=FP32, weight_dtype=FP32), device)
    gradients = []
    for backend in ("triton", "reference"):
        q, k, v = split_qkv(*given.arguments, backend=backend)
        turned = [x.transpose(1, 2) for x in (q, k, v)]
        ds = [d.transpose(1, 2).contiguous() for d in given.d_outputs]
        gradients.append(torch.autograd.grad(turned, given.leaves, ds))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


def test_one_output_used_alone(device):
    given = split_qkv_inputs(SplitQkvCase(S=6, G=2, per_group=2, D=16, dtype=FP32, weight_dtype=FP32), device)
    for used in range(3):
        gradients = [
            torch.autograd.grad(
                split_qkv(*given.arguments, backend=backend)[used].sum(), given.leaves, materialize_grads=True
            )
            for backend in ("triton", "reference")
        ]
        for actual, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(actual, expected)


def test_frozen_weights(device):
    given = split_qkv_inputs(SplitQkvCase(S=6, G=2, per_group=2, D=16, dtype=FP32, weight_dtype=FP32), device)
    frozen = [w.detach() for w in given.weights]
    pair = []
    for backend in ("triton", "reference"):
        outputs = split_qkv(given.qkv, given.cos, given.sin, *frozen, 1e-6, backend=backend)
        pair += torch.autograd.grad(outputs, given.qkv, given.d_outputs)
    torch.testing.assert_close(*pair)


def test_weights_add_to_their_main_gradients(device):
    given = split_qkv_inputs(SplitQkvCase(S=6, G=2, per_group=2, D=16), device)
    outputs = split_qkv(*given.arguments, backend="triton")
    expected = torch.autograd.grad(outputs, given.leaves, given.d_outputs)
    mains = [MainGradient(torch.full((16,), float("nan"), device=device)) for _ in range(2)]
    for weight, main in zip(given.weights, mains, strict=True):
        set_main_gradient(weight, main)
    for _ in range(2):
        torch.autograd.backward(split_qkv(*given.arguments, backend="triton"), given.d_outputs)
    assert [w.grad for w in given.weights] == [None, None]
    torch.testing.assert_close(given.qkv.grad, 2 * expected[0])
    for main, weight_gradient in zip(mains, expected[1:], strict=True):
        torch.testing.assert_close(main.finish(), 2 * weight_gradient.float(), rtol=2**-7, atol=0)


# Planted faults: each computes something else than the definition, and the oracle must say so.


def _sin_turned_around(qkv, cos, sin, q_weight, k_weight, eps):
    return split_qkv_reference(qkv, cos, -sin, q_weight, k_weight, eps)


def _position_off_by_one(qkv, cos, sin, q_weight, k_weight, eps):
    return split_qkv_reference(qkv, cos.roll(1, 0), sin.roll(1, 0), q_weight, k_weight, eps)


def _neighbours_turned(qkv, cos, sin, q_weight, k_weight, eps):
    q, k, v = split_qkv_reference(qkv, cos[:, :1] * 0 + 1, sin[:, :1] * 0, q_weight, k_weight, eps)

    def turned(x):
        apart = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return rotate(apart, cos[:, None], sin[:, None]).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)

    return turned(q), turned(k), v


def _weights_exchanged(qkv, cos, sin, q_weight, k_weight, eps):
    return split_qkv_reference(qkv, cos, sin, k_weight, q_weight, eps)


def _eps_dropped(qkv, cos, sin, q_weight, k_weight, eps):
    return split_qkv_reference(qkv, cos, sin, q_weight, k_weight, 0.0)


def _keys_turned_by_queries_weight_gradient(qkv, cos, sin, q_weight, k_weight, eps):
    q, k, v = split_qkv_reference(qkv, cos, sin, q_weight, k_weight.detach() + 0 * k_weight, eps)
    return q, k, v


def _heads_of_another_group(qkv, cos, sin, q_weight, k_weight, eps):
    q, k, v = split_qkv_reference(qkv, cos, sin, q_weight, k_weight, eps)
    return q.roll(1, 2), k, v


def _gradient_of_values_dropped(qkv, cos, sin, q_weight, k_weight, eps):
    q, k, v = split_qkv_reference(qkv, cos, sin, q_weight, k_weight, eps)
    return q, k, v.detach()


def _last_element_not_written(qkv, cos, sin, q_weight, k_weight, eps):
    q, k, v = split_qkv_reference(qkv, cos, sin, q_weight, k_weight, eps)
    return q, torch.cat([k.flatten()[:-1], torch.empty_like(k).flatten()[-1:]]).view_as(k), v


@pytest.mark.parametrize(
    ("fault", "caught_as"),
    [
        (_sin_turned_around, "q"),
        (_position_off_by_one, "q"),
        (_neighbours_turned, "q"),
        (_weights_exchanged, "q"),
        (_eps_dropped, "q"),
        (_keys_turned_by_queries_weight_gradient, "d_k_weight"),
        (_heads_of_another_group, "q"),
        (_gradient_of_values_dropped, "d_qkv"),
        (_last_element_not_written, "k"),
    ],
)
def test_oracle_catches(fault, caught_as, device):
    case = SplitQkvCase(S=7, G=2, per_group=3, D=32, scale=1e-3)
    check_split_qkv(split_qkv_reference, case, device, fused=False)
    with pytest.raises(AssertionError, match=rf"^{caught_as}:"):
        check_split_qkv(fault, case, device, fused=False)


def test_arguments_that_do_not_fit():
    qkv, cos, weight = torch.zeros(2, 3, 2, 4, 8), torch.zeros(3, 4), torch.zeros(8)

    def refused(match: str, *arguments, **keywords):
        with pytest.raises(ValueError, match=match):
            split_qkv(*arguments, **keywords)

    refused(r"qkv_BSGXD: expected dtype torch.float32 or torch.bfloat16, found torch.float16", qkv.half(), cos, cos)
    refused(
        r"expected \[B, S, G, queries of a group \+ 2, D\], .* found shape \(2, 3, 2, 32\)", qkv.flatten(3), cos, cos
    )
    refused(r"at least one query .* found shape \(2, 3, 2, 2, 8\)", qkv[:, :, :, :2].contiguous(), cos, cos)
    refused(
        r"cos_SR: expected torch.float32 of 1 to 4 pairs of channels, .* shape \(3, 5\)", qkv, torch.zeros(3, 5), cos
    )
    refused(r"cos_SR: expected torch.float32 .* found torch.bfloat16", qkv, cos.bfloat16(), cos)
    refused(r"cos_SR: expected shape \(3, 4\) \(a row for each position\)", qkv, torch.zeros(4, 4), cos)
    refused(r"sin_SR: expected shape \(3, 4\) \(that of cos_SR\)", qkv, cos, torch.zeros(3, 3))
    refused(r"expected weights for queries and keys or for neither, found one", qkv, cos, cos, weight)
    refused(r"k_weight_D: expected shape \(8,\) \(the width of a head\)", qkv, cos, cos, weight, weight[:4])
    refused(r"backend: expected one of reference, .* found 'cuda'", qkv, cos, cos, backend="cuda")
