"""swiglu: the Triton kernels against fp64, and an oracle that sees planted faults."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ckptbridge.kernels.swiglu import SwigluConfig, swiglu, swiglu_reference
from tests.kernels.cases import FP32, REAL_SWIGLU, SMALL_SWIGLU, SwigluCase
from tests.kernels.oracle_swiglu import check_swiglu, swiglu_inputs

# exp(100) is infinite in fp32, as it should be on the way to a sigmoid of 0; the interpreter's numpy remarks on it.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

CASES = SMALL_SWIGLU + (REAL_SWIGLU if torch.cuda.is_available() else [])


def test_reference_is_hugging_faces_in_fp32():
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

    torch.manual_seed(0)
    mlp = LlamaMLP(LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2))
    x = torch.randn(5, 16)
    packed = torch.nn.functional.linear(x, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
    torch.testing.assert_close(mlp.down_proj(swiglu(packed)), mlp(x))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradient_equal_fp64(case, backend, device):
    check_swiglu(partial(swiglu, backend=backend), case, device)


# torch.compile's own import deprecates a function of torch.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_torch_backend_equals_fp64(device):
    check_swiglu(partial(swiglu, backend="torch"), SwigluCase(R=33, F=130), device)


def test_other_launch_knobs_give_the_same_numbers(device):
    config = SwigluConfig(block_rows=4, block_width=64, num_warps=2)
    check_swiglu(partial(swiglu, backend="triton", config=config), SwigluCase(R=7, F=200), device)


def test_expanded_gradient_and_leading_dimensions(device):
    x = swiglu_inputs(SwigluCase(R=6, F=40, dtype=FP32), device).x.detach().view(2, 3, 80).requires_grad_()
    actual, expected = swiglu(x, backend="triton"), swiglu_reference(x)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(out.sum(), x)[0] for out in (actual, expected)))


def test_a_gradient_in_the_place_of_the_input(device):
    """The same bits as in memory of its own, and no second pass through what is no longer there."""
    given = swiglu_inputs(SwigluCase(R=9, F=96), device)
    (expected,) = torch.autograd.grad(swiglu(given.x, backend="triton"), given.x, given.d_out)
    x = given.x.detach().clone()
    fc1 = x.requires_grad_() * 1  # as a matrix product gives it: nobody's leaf
    where = fc1.data_ptr()
    out = swiglu(fc1, overwrites_x=True, backend="triton")
    (dx,) = torch.autograd.grad(out, fc1, given.d_out, retain_graph=True)
    assert dx.data_ptr() == where
    assert torch.equal(dx, expected)
    with pytest.raises(RuntimeError, match="swiglu: a second backward pass through one graph"):
        torch.autograd.grad(out, fc1, given.d_out)


# Planted faults: each computes something else than the definition, and the oracle must say so.


def _halves_swapped(x):
    gate_proj, up_proj = x.chunk(2, -1)
    return swiglu_reference(torch.cat([up_proj, gate_proj], -1))


def _halves_interleaved(x):
    return swiglu_reference(torch.cat([x[:, ::2], x[:, 1::2]], -1))


def _gelu_for_silu(x):
    gate_proj, up_proj = x.float().chunk(2, -1)
    return (torch.nn.functional.gelu(gate_proj) * up_proj).to(x.dtype)


def _gradient_of_up_proj_dropped(x):
    gate_proj, up_proj = x.chunk(2, -1)
    return swiglu_reference(torch.cat([gate_proj, up_proj.detach()], -1))


def _gradient_through_the_sigmoid_dropped(x):
    gate_proj, up_proj = x.float().chunk(2, -1)
    return (gate_proj * gate_proj.sigmoid().detach() * up_proj).to(x.dtype)


def _columns_shifted(x):
    return swiglu_reference(x).roll(1, -1)


def _last_element_not_written(x):
    out = swiglu_reference(x)
    return torch.cat([out.flatten()[:-1], torch.empty_like(out).flatten()[-1:]]).view_as(out)


@pytest.mark.parametrize(
    ("fault", "caught_as"),
    [
        (_halves_swapped, "out"),
        (_halves_interleaved, "out"),
        (_gelu_for_silu, "out"),
        (_gradient_of_up_proj_dropped, "dx"),
        (_gradient_through_the_sigmoid_dropped, "dx"),
        (_columns_shifted, "out"),
        (_last_element_not_written, "out"),
    ],
)
def test_oracle_catches(fault, caught_as, device):
    case = SwigluCase(R=9, F=96)
    check_swiglu(swiglu_reference, case, device)
    with pytest.raises(AssertionError, match=caught_as):
        check_swiglu(fault, case, device)


def test_arguments_that_do_not_fit():
    def refused(match: str, x: torch.Tensor, **keywords):
        with pytest.raises(ValueError, match=match):
            swiglu(x, **keywords)

    refused(r"x: expected dtype torch.float32 or torch.bfloat16, found torch.int64", torch.zeros(2, 8).long())
    refused(r"x: expected a contiguous tensor, found shape \(8, 2\) with strides \(1, 8\)", torch.zeros(2, 8).T)
    refused(r"x: expected rows of \[gate_proj; up_proj\], an even width .* found shape \(2, 7\)", torch.zeros(2, 7))
    refused(r"found shape \(\)", torch.tensor(0.0))
    refused(r"backend: expected one of reference, .* found 'cuda'", torch.zeros(2, 8), backend="cuda")
