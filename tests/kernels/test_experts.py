"""experts: outputs, gradients and main gradients against fp64, and an oracle that sees planted faults."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from ckptbridge.kernels.experts import ProductsConfig, experts, experts_reference
from ckptbridge.kernels.main_gradient import main_gradient_of
from ckptbridge.kernels.order import Order
from tests.kernels.cases import FP32
from tests.kernels.cases_experts import REAL_EXPERTS, SMALL_EXPERTS, ExpertsCase
from tests.kernels.oracle_experts import MAIN_GRADIENTS, check_experts, experts_inputs

CASES = SMALL_EXPERTS + (REAL_EXPERTS if torch.cuda.is_available() else [])
PRODUCTS = {
    "torch": ProductsConfig(matmul="torch", weight_gradient="torch"),
    "triton": ProductsConfig(matmul="triton", weight_gradient="triton"),
    "gathering": ProductsConfig(matmul="triton", weight_gradient="triton", gathers_forward=True, gathers_gradient=True),
    "gathering-forward": ProductsConfig(matmul="triton", weight_gradient="torch", gathers_forward=True),
}


def operation(backend: str = "triton", config: ProductsConfig | None = None):
    def run(x, weights, order, fc1, fc2, activation):
        return experts(x, weights, order, fc1, fc2, activation=activation, backend=backend, config=config)

    return run


def in_one_launch(case: ExpertsCase) -> bool:
    """Whether the grouped products take it: bf16, and rows of a multiple of 16 bytes."""
    return case.dtype == torch.bfloat16 and case.H % 8 == case.F % 8 == 0 and case.aligned and case.T > 0


# On a GPU each case compiles ten grouped products, of which other tests see many shapes.
IN_ONE_LAUNCH = [case for case in SMALL_EXPERTS if in_one_launch(case)]
if torch.cuda.is_available():
    IN_ONE_LAUNCH = [IN_ONE_LAUNCH[0], SMALL_EXPERTS[8], REAL_EXPERTS[2]]


@pytest.mark.parametrize("case", SMALL_EXPERTS, ids=str)
def test_reference_equals_fp64(case, device):
    check_experts(operation("reference"), case, device)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_equal_fp64(case, device):
    check_experts(operation("triton"), case, device)


@pytest.mark.parametrize("config", PRODUCTS.values(), ids=PRODUCTS.keys())
@pytest.mark.parametrize("case", IN_ONE_LAUNCH, ids=str)
def test_every_kind_of_grouped_product_equals_fp64(case, config, device):
    check_experts(operation(config=config), case, device, main_gradient="added to")


@pytest.mark.parametrize("main_gradient", MAIN_GRADIENTS[1:])
@pytest.mark.parametrize("case", [SMALL_EXPERTS[0], SMALL_EXPERTS[2]], ids=str)
def test_gradients_go_to_the_main_gradient(case, main_gradient, device):
    check_experts(operation("reference"), case, device, main_gradient=main_gradient)
    check_experts(operation("triton"), case, device, main_gradient=main_gradient)


@pytest.mark.slow  # torch.compile takes a minute on two cores
# torch.compile's own import deprecates a function of torch.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("case", [SMALL_EXPERTS[0], SMALL_EXPERTS[1]], ids=str)
def test_torch_backend_equals_fp64(case, device):
    check_experts(operation("torch"), case, device)


def test_frozen_matrices_and_tokens(device):
    """What needs no gradient gets none, and the others' stay what they are."""
    case = ExpertsCase(T=23, K=2, E=4, H=16, F=24, dtype=FP32)
    given = experts_inputs(case, device)
    run = partial(experts, backend="triton")
    every = torch.autograd.grad(
        run(given.x, given.weights, given.order, given.fc1, given.fc2), list(given.leaves.values()), given.d_out
    )
    for place, leaf in enumerate(given.leaves.values()):
        others = [t.detach() for t in given.leaves.values()]
        others[place] = leaf
        x, weights, fc1, fc2 = others
        (alone,) = torch.autograd.grad(run(x, weights, given.order, fc1, fc2), leaf, given.d_out)
        assert torch.equal(alone, every[place])


@pytest.mark.parametrize("hooked", [False, True])
def test_a_second_backward_pass_is_refused(hooked, device):
    """Behind hooks of saved tensors too, which hide from torch that one was written into."""
    given = experts_inputs(ExpertsCase(T=5, K=1, E=2, H=8, F=8, dtype=FP32), device)
    for backend in ("reference", "triton"):
        with saved_tensors_hooks(lambda kept: kept, lambda kept: kept) if hooked else nullcontext():
            out = experts(given.x, given.weights, given.order, given.fc1, given.fc2, backend=backend)
        out.backward(given.d_out, retain_graph=True)
        with pytest.raises(RuntimeError, match="experts: a second backward pass through one graph"):
            out.backward(given.d_out)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("config", PRODUCTS.values(), ids=PRODUCTS.keys())
def test_a_graph_follows_other_choices(config, device):
    """Captured with one routing and replayed with another: nothing of the first was read on the host."""
    case = ExpertsCase(T=300, K=2, E=8, H=136, F=72, spread="empty")
    given, other = experts_inputs(case, device, seed=0), experts_inputs(replace(case, spread="ragged"), device, seed=1)
    order = Order(*(tensor.clone() for tensor in (given.order.tokens_R, given.order.rows_TK, given.order.ends_E)))
    run = partial(experts, backend="triton", config=config)

    def step(order: Order) -> list[torch.Tensor]:
        out = run(given.x, given.weights, order, given.fc1, given.fc2)
        return [out, *torch.autograd.grad(out, list(given.leaves.values()), given.d_out)]

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(order)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        made = step(order)
    for name in ("tokens_R", "rows_TK", "ends_E"):
        getattr(order, name).copy_(getattr(other.order, name))
    graph.replay()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):  # where autograd met the inputs at first
        expected = step(other.order)
    torch.cuda.synchronize()
    assert all(map(torch.equal, made, expected))


# Planted faults: each computes something else than the definition, and the oracle must say so.


def _with_gradient(true, faulty):
    """The true value, with the gradient of another one besides its own."""
    return true + (faulty - faulty.detach())


def _gate_and_up_swapped(x, weights, order, fc1, fc2, activation):
    return experts_reference(x, weights, order, torch.cat(fc1.chunk(2, 1)[::-1], 1), fc2, activation)


def _weight_applied_twice(x, weights, order, fc1, fc2, activation):
    return experts_reference(x, weights * weights, order, fc1, fc2, activation)


def _weight_forgotten_for_fc2(x, weights, order, fc1, fc2, activation):
    true = experts_reference(x, weights, order, fc1, fc2.detach(), activation)
    ones = torch.ones_like(weights)
    return _with_gradient(true, experts_reference(x.detach(), ones, order, fc1.detach(), fc2, activation))


def _weight_twice_for_fc1(x, weights, order, fc1, fc2, activation):
    true = experts_reference(x, weights, order, fc1.detach(), fc2, activation)
    return _with_gradient(
        true, experts_reference(x.detach(), weights.detach() ** 2, order, fc1, fc2.detach(), activation)
    )


def _gradient_of_the_weights_doubled(x, weights, order, fc1, fc2, activation):
    return experts_reference(x, 2 * weights - weights.detach(), order, fc1, fc2, activation)


def _neighbours_fc2(x, weights, order, fc1, fc2, activation):
    return experts_reference(x, weights, order, fc1, fc2.roll(1, 0), activation)


def _neighbours_fc1_for_x(x, weights, order, fc1, fc2, activation):
    true = experts_reference(x.detach(), weights, order, fc1, fc2, activation)
    return _with_gradient(
        true, experts_reference(x, weights.detach(), order, fc1.detach().roll(1, 0), fc2.detach(), activation)
    )


def _combined_in_the_wrong_order(x, weights, order, fc1, fc2, activation):
    return experts_reference(x, weights.flip(1), order, fc1, fc2, activation)


def _dropped_choices_counted(x, weights, order, fc1, fc2, activation):
    kept = Order(order.tokens_R, order.rows_TK.clamp(min=0), order.ends_E)
    return experts_reference(x, weights, kept, fc1, fc2, activation)


def _last_row_at_the_next_expert(x, weights, order, fc1, fc2, activation):
    early = Order(order.tokens_R, order.rows_TK, (order.ends_E - 1).clamp(min=0))
    return experts_reference(x, weights, early, fc1, fc2, activation)


@pytest.mark.parametrize(
    ("fault", "caught_as"),
    [
        (_gate_and_up_swapped, "dfc1 of expert 0"),
        (_weight_applied_twice, "dfc1 of expert 0"),
        (_weight_forgotten_for_fc2, "dfc2 of expert 0"),
        (_weight_twice_for_fc1, "dfc1 of expert 0"),
        (_gradient_of_the_weights_doubled, "dweights"),
        (_neighbours_fc2, "dfc1 of expert 0"),
        (_neighbours_fc1_for_x, "dx"),
        (_combined_in_the_wrong_order, "dfc1 of expert 0"),
        (_dropped_choices_counted, "of expert 0"),
        (_last_row_at_the_next_expert, "of expert 0"),
    ],
)
def test_oracle_catches(fault, caught_as, device):
    # In fp32: autograd's way through the definition rounds bf16 once more than the bounds allow for.
    case = ExpertsCase(T=40, K=2, E=4, H=72, F=40, capacity=17, dtype=FP32)
    check_experts(experts_reference, case, device)
    with pytest.raises(AssertionError, match=caught_as):
        check_experts(fault, case, device)


def _unused_rows_read(x, weights, order, fc1, fc2, activation):
    longer = order.ends_E.clone()
    longer[-1] = len(order.tokens_R)
    longer = Order(order.tokens_R, order.rows_TK, longer)
    # A product that gathers would follow an unused row's index to wherever it leads.
    config = replace(ProductsConfig.from_shape("triton", x, fc1, fc2), gathers_forward=False, gathers_gradient=False)
    return experts(x, weights, longer, fc1, fc2, activation=activation, backend="triton", config=config)


def test_oracle_catches_unused_rows_in_a_gradient(device):
    case = SMALL_EXPERTS[8]
    with pytest.raises(AssertionError, match=f"of expert {case.E - 1}: .* nan"):
        check_experts(_unused_rows_read, case, device)


def _overwritten(x, weights, order, fc1, fc2, activation):
    main_gradient_of(fc2).is_filled = False
    return experts(x, weights, order, fc1, fc2, activation=activation)


def _added_to_garbage(x, weights, order, fc1, fc2, activation):
    main_gradient_of(fc2).is_filled = True
    return experts(x, weights, order, fc1, fc2, activation=activation)


@pytest.mark.parametrize(("fault", "main_gradient"), [(_overwritten, "added to"), (_added_to_garbage, "overwritten")])
def test_oracle_catches_an_ignored_accumulate_flag(fault, main_gradient, device):
    with pytest.raises(AssertionError, match="dfc2 of expert 0"):
        check_experts(fault, SMALL_EXPERTS[0], device, main_gradient=main_gradient)


def test_arguments_that_do_not_fit():
    x, fc1, fc2 = torch.zeros(3, 8), torch.zeros(2, 8, 8), torch.zeros(2, 8, 4)
    rows = torch.arange(6, dtype=torch.int32)
    order = Order(rows // 2, rows.view(3, 2), torch.tensor([3, 6], dtype=torch.int32))
    weights = torch.ones(3, 2)

    def refused(match: str, *arguments, **keywords):
        with pytest.raises(ValueError, match=match):
            experts(*arguments, **keywords)

    refused(
        r"activation: expected one of swiglu, squared_relu; found 'gelu'",
        x,
        weights,
        order,
        fc1,
        fc2,
        activation="gelu",
    )
    refused(
        r"fc1_EOH: expected dtype torch.float32 of x_TH, found torch.bfloat16", x, weights, order, fc1.bfloat16(), fc2
    )
    refused(
        r"weights_TK: expected shape \(3, 2\) \(one for each choice\), found \(3, 1\)",
        x,
        weights[:, :1].contiguous(),
        order,
        fc1,
        fc2,
    )
    refused(r"weights_TK: expected dtype torch.float32, found torch.bfloat16", x, weights.bfloat16(), order, fc1, fc2)
    refused(r"x_TH: expected shape \(3, 8\) \(a row for each token", torch.zeros(2, 8), weights, order, fc1, fc2)
    refused(
        r"fc1_EOH: expected shape \(2, 4, 8\) \(that of fc2_EHF, squared_relu\), found \(2, 8, 8\)",
        x,
        weights,
        order,
        fc1,
        fc2,
        activation="squared_relu",
    )
    refused(
        r"order.ends_E: expected shape \(2,\) \(the experts of fc2_EHF\), found \(1,\)",
        x,
        weights,
        replace(order, ends_E=order.ends_E[:1]),
        fc1,
        fc2,
    )
