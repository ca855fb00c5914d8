"""route and router_logits: both backends against fp64, and oracles that see planted faults."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from ckptbridge.kernels.main_gradient import MainGradient, set_main_gradient
from ckptbridge.kernels.order import order_by_expert
from ckptbridge.kernels.router_logits import router_logits
from ckptbridge.kernels.routing import RoutingConfig, route
from tests.kernels.cases_routing import (
    REAL_LOGITS,
    REAL_ROUTE,
    SMALL_LOGITS,
    SMALL_ROUTE,
    LogitsCase,
    RouteCase,
)
from tests.kernels.oracle_routing import check_route, check_router_logits, logits_inputs, route_inputs

# exp of the logits of 200 is zero in fp32 and exp(100) infinite on the way to a sigmoid; numpy remarks on it.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

ON_GPU = torch.cuda.is_available()


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("case", SMALL_ROUTE + (REAL_ROUTE if ON_GPU else []), ids=str)
def test_routes_and_gradient_equal_fp64(case, backend, device):
    check_route(partial(route, backend=backend), case, device, fused=backend == "triton")


@pytest.mark.slow  # torch.compile takes 10 to 75 s on two cores
# torch.compile's own import deprecates a function of torch.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_torch_backend_equals_fp64(device):
    check_route(partial(route, backend="torch"), RouteCase(T=33, E=60, K=4), device, fused=False)


def test_other_launch_knobs_give_the_same_numbers(device):
    config = RoutingConfig(block_tokens=4, block_experts=64, num_warps=2, programs_per_multiprocessor=1)
    check_route(partial(route, backend="triton", config=config), RouteCase(T=39, E=60, K=4), device)


def test_repeated_passes_give_the_same_bits(device):
    given = route_inputs(RouteCase(T=1100, E=60, K=4), device)
    results = []
    for _ in range(2):
        routes = route(given.logits, topk=4, backend="triton")
        outputs = (routes.weights_TK, routes.probability_sum_E, routes.z_sum)
        results.append((*outputs, *torch.autograd.grad(outputs, given.logits, given.output_gradients)))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("used", range(3), ids=["weights_TK", "probability_sum_E", "z_sum"])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_one_output_used_alone(used, score_function, device):
    """The other outputs' gradients never exist, and this one's arrives expanded, without memory of its own."""
    given = route_inputs(RouteCase(T=21, E=10, K=3), device)
    gradients = []
    for backend in ("triton", "reference"):
        routes = route(given.logits, topk=3, score_function=score_function, pre_softmax=True, backend=backend)
        output = (routes.weights_TK, routes.probability_sum_E, routes.z_sum)[used]
        gradients.append(torch.autograd.grad(output.sum(), given.logits)[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_equal_scores_go_to_the_lowest_index(score_function, device):
    logits = torch.tensor([[0.0, 1, 1, 1, 0], [2, 2, 2, 2, 2], [0, 0, 0, 0, 3]], device=device)
    routes = route(logits, topk=3, score_function=score_function, backend="triton")
    assert routes.experts_TK.tolist() == [[1, 2, 3], [0, 1, 2], [4, 0, 1]]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_logits_that_are_no_numbers_lead_nowhere_else(device):
    """A run that diverges says so by its loss, not by an address beyond a buffer."""
    logits = torch.full((3, 5), torch.nan, device=device)
    experts = route(logits, topk=3, backend="triton").experts_TK
    assert ((experts >= 0) & (experts < 5)).all()


# Planted faults: each computes something else than the definition, and the oracle must say so.


def _changed(change):
    def operation(logits, bias, **keywords):
        return change(route(logits, bias, **keywords), logits)

    return operation


def _another(**others):
    return lambda logits, bias, **keywords: route(logits, bias, **keywords | others)


def _second_best(logits, bias, *, topk, **keywords):
    routes = route(logits, bias, topk=topk + 1, **keywords)
    return replace(routes, experts_TK=routes.experts_TK[:, 1:].contiguous(), weights_TK=routes.weights_TK[:, 1:])


def _bias_weighs(logits, bias, **keywords):
    return route(logits + bias, None, **keywords)


SOFTMAX = RouteCase(T=37, E=12, K=3)
SIGMOID = RouteCase(T=37, E=12, K=3, score_function="sigmoid", has_bias=True, scaling_factor=2.5)


@pytest.mark.parametrize(
    ("fault", "caught_as", "case"),
    [
        (_second_best, "experts_TK", SOFTMAX),
        (_changed(lambda r, _: replace(r, experts_TK=r.experts_TK.flip(1))), "experts_TK", SOFTMAX),
        (_changed(lambda r, _: replace(r, experts_TK=r.experts_TK[:, :1].expand(-1, 3))), "experts_TK", SOFTMAX),
        (_changed(lambda r, _: replace(r, choices_E=r.choices_E.roll(1))), "choices_E", SOFTMAX),
        (_another(pre_softmax=True), "weights_TK", SOFTMAX),
        (_another(scaling_factor=None), "weights_TK", SIGMOID),
        (_another(pre_softmax=True), "weights_TK", SIGMOID),
        (lambda logits, bias, **k: route(logits, None, **k), "experts_TK", SIGMOID),
        (_bias_weighs, "experts_TK|weights_TK", SIGMOID),
        (_changed(lambda r, _: replace(r, weights_TK=r.weights_TK.detach())), "d_logits_TE", SOFTMAX),
        (_changed(lambda r, x: replace(r, probability_sum_E=x.softmax(-1).mean(0))), "probability_sum_E", SOFTMAX),
        (_changed(lambda r, x: replace(r, probability_sum_E=x.sigmoid().sum(0))), "probability_sum_E", SIGMOID),
        (_changed(lambda r, _: replace(r, probability_sum_E=r.probability_sum_E.detach())), "d_logits_TE", SOFTMAX),
        (_changed(lambda r, x: replace(r, z_sum=x.logsumexp(-1).sum())), "z_sum", SOFTMAX),
        (_changed(lambda r, x: replace(r, z_sum=x.sigmoid().sum(-1).log().square().sum())), "z_sum", SIGMOID),
        (_changed(lambda r, _: replace(r, z_sum=r.z_sum.detach())), "d_logits_TE", SIGMOID),
    ],
)
def test_oracle_of_route_catches(fault, caught_as, case, device):
    check_route(route, case, device)
    with pytest.raises(AssertionError, match=caught_as):
        check_route(fault, case, device)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("case", SMALL_LOGITS + (REAL_LOGITS if ON_GPU else []), ids=str)
def test_logits_and_gradients_equal_fp64(case, backend, device):
    check_router_logits(partial(router_logits, backend=backend), case, device)


def test_weight_gradient_goes_to_the_main_gradient(device):
    case = LogitsCase(T=37, H=96, E=6)
    main = torch.full((6, 96), torch.nan, device=device)

    def into_main(x, weight, bias):
        set_main_gradient(weight, MainGradient(main))
        return router_logits(x, weight, bias, backend="triton")

    check_router_logits(into_main, case, device, main_gradient=main)


def test_main_gradient_adds_up(device):
    given = logits_inputs(LogitsCase(T=37, H=96, E=6), device)
    main = MainGradient(torch.full((6, 96), torch.nan, device=device))
    set_main_gradient(given.weight, main)
    for _ in range(2):
        router_logits(given.x, given.weight, backend="triton").backward(given.d_logits)
    expected = given.d_logits.double().t() @ given.x.detach().double()
    torch.testing.assert_close(main.finish(), (2 * expected).float(), rtol=1e-4, atol=1e-3)
    assert given.weight.grad is None


class _HighHalfOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x.float() @ weight.float().t()

    @staticmethod
    def backward(ctx, d_logits):
        x, weight = ctx.saved_tensors
        high = d_logits.bfloat16()
        return (high.float() @ weight.float()).bfloat16(), (high.float().t() @ x.float()).bfloat16()


@pytest.mark.parametrize(
    ("fault", "caught_as"),
    [
        (lambda x, weight, bias: (x @ weight.t()).float(), "logits_TE"),
        (lambda x, weight, bias: _HighHalfOnly.apply(x, weight), "dx_TH|d_weight_EH"),
        (lambda x, weight, bias: x.float() @ weight.float().detach().t() + 0 * weight.sum(), "d_weight_EH"),
        (lambda x, weight, bias: x.float().detach() @ weight.float().t() + 0 * x.sum(), "dx_TH"),
    ],
)
def test_oracle_of_logits_catches(fault, caught_as, device):
    case = LogitsCase(T=130, H=96, E=60)
    check_router_logits(partial(router_logits, backend="reference"), case, device)
    with pytest.raises(AssertionError, match=caught_as):
        check_router_logits(fault, case, device)


def test_arguments_that_do_not_fit():
    logits = torch.zeros(3, 4)

    def refused(match: str, logits=logits, bias=None, topk=2, **keywords):
        with pytest.raises(ValueError, match=match):
            route(logits, bias, topk=topk, **keywords)

    refused("logits_TE: expected dtype torch.float32, found torch.bfloat16", logits.bfloat16())
    refused("logits_TE: expected a contiguous tensor", logits.t())
    refused(r"logits_TE: expected \[T, E\] with 1 to 1024 experts, found shape \(12,\)", logits.flatten())
    refused(r"expert_bias_E: expected shape \(4,\)", bias=torch.zeros(3))
    refused("topk: expected 1 to 4, .* found 5", topk=5)
    refused("score_function: expected softmax or sigmoid, found 'relu'", score_function="relu")
    refused("backend: expected one of reference", backend="cuda")
    for x, weight, bias, match in (
        (torch.zeros(3, 4), torch.zeros(2, 5), None, r"expected \[T, H\] and \[E, H\], found shapes \(3, 4\) and"),
        (torch.zeros(3, 4), torch.zeros(2, 4), torch.zeros(3), r"bias_E: expected shape \(2,\)"),
        (torch.zeros(3, 4).long(), torch.zeros(2, 4), None, "x_TH: expected dtype"),
    ):
        with pytest.raises(ValueError, match=match):
            router_logits(x, weight, bias, backend="reference")


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no CUDA device")
@pytest.mark.parametrize("limits", [{}, {"capacity": 130, "pad_to_capacity": True}], ids=["dropless", "padded"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_graph_replays_on_other_logits(backend, limits, device):
    """Nothing waits for the device, or the capture would fail; nothing is a constant of the captured run."""
    first, second = (route_inputs(RouteCase(T=1100, E=60, K=4), device, seed) for seed in (1, 2))
    logits = first.logits.detach().clone().requires_grad_()

    def step(logits):
        routes = route(logits, topk=4, backend=backend)
        order = order_by_expert(routes.experts_TK, 60, weights_TK=routes.weights_TK, backend=backend, **limits)
        outputs = (routes.weights_TK, routes.probability_sum_E, routes.z_sum)
        d_logits = torch.autograd.grad(outputs, logits, first.output_gradients)[0]
        return *outputs, routes.choices_E, d_logits, order.tokens_R, order.rows_TK, order.ends_E

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(logits)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        captured = step(logits)
    with torch.no_grad():
        logits.copy_(second.logits)
    graph.replay()
    assert all(map(torch.equal, captured, step(second.logits)))
