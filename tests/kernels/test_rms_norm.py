"""rms_norm: Hugging Face's numbers, the Triton kernels against fp64, and an oracle that sees planted faults."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ckptbridge.kernels.main_gradient import MainGradient, set_main_gradient
from ckptbridge.kernels.rms_norm import RmsNormConfig, rms_norm, rms_norm_reference
from tests.kernels.cases import BF16, FP32, REAL_RMS_NORM, SMALL_RMS_NORM, RmsNormCase
from tests.kernels.oracle_rms_norm import check_rms_norm, rms_norm_inputs

CASES = SMALL_RMS_NORM + (REAL_RMS_NORM if torch.cuda.is_available() else [])


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_reference_is_hugging_faces_bit_for_bit(dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(0)
    norm = LlamaRMSNorm(96, eps=1e-6).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x, residual, d_normed, d_summed = torch.randn(4, 5, 7, 96).to(dtype).unbind()
    x.requires_grad_()
    residual.requires_grad_()
    leaves = (x, norm.weight, residual)

    summed = x + residual
    expected = (norm(summed), summed)
    expected += torch.autograd.grad(expected, leaves, (d_normed, d_summed))
    actual = rms_norm(x, norm.weight, 1e-6, residual)
    actual += torch.autograd.grad(actual, leaves, (d_normed, d_summed))

    assert all(map(torch.equal, actual, expected))
    assert torch.equal(rms_norm(x, norm.weight, 1e-6), norm(x))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_equal_fp64(case, backend, device):
    check_rms_norm(partial(rms_norm, backend=backend), case, device, fused=backend == "triton")


@pytest.mark.slow  # torch.compile takes 10 to 75 s on two cores
# torch.compile's own import deprecates a function of torch.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_torch_backend_equals_fp64(device):
    check_rms_norm(partial(rms_norm, backend="torch"), RmsNormCase(R=33, H=130), device)


def test_other_launch_knobs_give_the_same_numbers(device):
    config = RmsNormConfig(
        block_rows=4,
        block_width=256,
        num_warps_forward=1,
        num_warps_backward=2,
        programs_per_multiprocessor=1,
        num_stages_backward=1,
    )
    check_rms_norm(partial(rms_norm, backend="triton", config=config), RmsNormCase(R=39, H=200), device)


def test_repeated_backward_gives_the_same_bits(device):
    given = rms_norm_inputs(RmsNormCase(R=64, H=130), device)
    outputs = rms_norm(given.x, given.weight, 1e-5, given.residual, backend="triton")
    first, second = (
        torch.autograd.grad(outputs, given.leaves, given.output_gradients, retain_graph=True) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_weight_adds_to_its_main_gradient(device):
    case = RmsNormCase(R=40, H=130, dtype=FP32, weight_dtype=FP32, has_residual=False)
    given = rms_norm_inputs(case, device)
    (expected,) = torch.autograd.grad(rms_norm(given.x, given.weight, 1e-5), given.weight, given.d_normed)
    main = MainGradient(torch.full((130,), float("nan"), device=device))
    set_main_gradient(given.weight, main)
    for _ in range(2):
        rms_norm(given.x, given.weight, 1e-5, backend="triton").backward(given.d_normed)
    assert given.weight.grad is None
    torch.testing.assert_close(main.finish(), 2 * expected)


@pytest.mark.parametrize("used", [0, 1], ids=["normed", "summed"])
def test_one_output_used_alone(used, device):
    """The other output's gradient never exists, and this one's arrives expanded, without memory of its own."""
    given = rms_norm_inputs(RmsNormCase(R=7, H=130, dtype=FP32, weight_dtype=FP32), device)
    gradients = []
    for backend in ("triton", "reference"):
        outputs = rms_norm(given.x, given.weight, 1e-5, given.residual, backend=backend)
        gradients.append(torch.autograd.grad(outputs[used].sum(), given.leaves, materialize_grads=True))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


def test_frozen_weight_and_leading_dimensions(device):
    given = rms_norm_inputs(RmsNormCase(R=6, H=64, dtype=FP32, weight_dtype=FP32, has_residual=False), device)
    weight = given.weight.detach()
    x, d_normed = (t.detach().view(2, 3, 64) for t in (given.x, given.d_normed))
    x.requires_grad_()
    actual = rms_norm(x, weight, 1e-5, backend="triton")
    expected = rms_norm_reference(x, weight, 1e-5)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, d_normed)[0] for y in (actual, expected)))


# Planted faults: each computes something else than the definition, and the oracle must say so.


def _eps_dropped(x, weight, eps, residual):
    return rms_norm_reference(x, weight, 0.0, residual)


def _weight_dropped(x, weight, eps, residual):
    return rms_norm_reference(x, torch.ones_like(weight) + 0 * weight, eps, residual)


def _residual_gradient_dropped(x, weight, eps, residual):
    return rms_norm_reference(x, weight, eps, residual.detach())


def _gradient_of_summed_dropped(x, weight, eps, residual):
    normed, summed = rms_norm_reference(x, weight, eps, residual)
    return normed, summed.detach()


def _residual_not_normalised(x, weight, eps, residual):
    return rms_norm_reference(x, weight, eps), x + residual


def _mean_over_the_padded_width(x, weight, eps, residual):
    normed, summed = rms_norm_reference(x, weight, eps, residual)
    return normed * (256 / x.shape[-1]) ** 0.5, summed


def _gradient_through_the_rms_dropped(x, weight, eps, residual):
    summed = x + residual
    wide = summed.float()
    inverse_rms = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps).detach()
    return weight * (wide * inverse_rms).to(x.dtype), summed


def _last_row_missing_from_dweight(x, weight, eps, residual):
    first = rms_norm_reference(x[:-1], weight, eps, residual[:-1])
    last = rms_norm_reference(x[-1:], weight.detach(), eps, residual[-1:])
    return tuple(map(torch.cat, zip(first, last, strict=True)))


def _last_element_not_written(x, weight, eps, residual):
    normed, summed = rms_norm_reference(x, weight, eps, residual)
    unwritten = torch.empty_like(normed)
    return torch.cat([normed.flatten()[:-1], unwritten.flatten()[-1:]]).view_as(normed), summed


def _input_overwritten(x, weight, eps, residual):
    outputs = rms_norm_reference(x, weight, eps, residual)
    with torch.no_grad():
        x.view(-1)[0] = 0  # .detach() shares memory, as a kernel's pointer does
    return outputs


@pytest.mark.parametrize(
    ("fault", "caught_as"),
    [
        (_eps_dropped, "normed"),
        (_weight_dropped, "normed"),
        (_residual_gradient_dropped, "dresidual"),
        (_gradient_of_summed_dropped, "dx"),
        (_residual_not_normalised, "normed"),
        (_mean_over_the_padded_width, "normed"),
        (_gradient_through_the_rms_dropped, "dx"),
        (_last_row_missing_from_dweight, "dweight"),
        (_last_element_not_written, "normed"),
    ],
)
def test_oracle_catches(fault, caught_as, device):
    case = RmsNormCase(R=33, H=130, scale=3e-3)
    check_rms_norm(rms_norm_reference, case, device, fused=False)
    with pytest.raises(AssertionError, match=caught_as):
        check_rms_norm(fault, case, device, fused=False)


def test_arguments_that_do_not_fit():
    x, weight = torch.zeros(4, 8), torch.zeros(8)

    def refused(match: str, *arguments, **keywords):
        with pytest.raises(ValueError, match=match):
            rms_norm(*arguments, **keywords)

    refused(r"x: expected dtype torch.float32 or torch.bfloat16, found torch.float16", x.half(), weight, 1e-5)
    refused(r"x: expected a contiguous tensor, found shape \(8, 4\) with strides", x.T, torch.zeros(4), 1e-5)
    refused(r"x: expected rows of 1 to 16384 elements, found shape \(4, 0\)", x[:, :0].contiguous(), weight, 1e-5)
    refused(r"x: expected rows of 1 to 16384 elements, found shape \(1, 16385\)", torch.zeros(1, 16385), weight, 1e-5)
    refused(r"weight: expected shape \(8,\) \(the width of x\), found \(4,\)", x, torch.zeros(4), 1e-5)
    refused(r"weight: expected device cpu, found meta", x, weight.to("meta"), 1e-5)
    refused(r"residual: expected shape \(4, 8\) \(that of x\), found \(3, 8\)", x, weight, 1e-5, x[:3])
    refused(r"residual: expected dtype torch.float32 of x, found torch.bfloat16", x, weight, 1e-5, x.bfloat16())
    refused(r"backend: expected one of reference, .* found 'cuda'", x, weight, 1e-5, backend="cuda")
