"""The oracles of route and router_logits: results and gradients against fp64, within derived bounds."""

# Shapes: T tokens, H hidden_size, E experts, K top-k.

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ckptbridge.kernels.routing import Routes, routes_of_choice
from tests.kernels.cases import BF16, random_tensor
from tests.kernels.cases_routing import LogitsCase, RouteCase
from tests.kernels.poison import poisoned_memory
from tests.kernels.tolerances import FLUSHED, FP32, INSIDE, REDUCTION, assert_close, unit_roundoff

Route = Callable[..., Routes]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteInputs:
    """Arguments and output gradients of one call."""

    logits: Tensor
    bias: Tensor | None
    d_weights: Tensor
    d_probability_sum: Tensor
    d_z_sum: Tensor

    @property
    def output_gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.d_weights, self.d_probability_sum, self.d_z_sum


def route_inputs(case: RouteCase, device: torch.device, seed: int = 0) -> RouteInputs:
    """Random inputs of a case; the bias is large enough to change the choice."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return random_tensor(shape, torch.float32, generator, scale=scale)

    return RouteInputs(
        logits=draw(case.T, case.E, scale=case.scale).requires_grad_(),
        bias=draw(case.E, scale=0.3) if case.has_bias else None,
        d_weights=draw(case.T, case.K),
        d_probability_sum=draw(case.E),
        d_z_sum=draw(1)[0] * 0.1,
    )


@poisoned_memory()
def check_route(operation: Route, case: RouteCase, device: torch.device, *, fused: bool = True, seed: int = 0) -> None:
    """Run `operation` forward and backward on a case; AssertionError names the first result that is off.

    Plain autograd (`fused=False`) takes the softmax behind a logsumexp from its rounded result.
    """
    given = route_inputs(case, device, seed)
    before = given.logits.detach().clone()
    rule = {
        "score_function": case.score_function,
        "pre_softmax": case.pre_softmax,
        "scaling_factor": case.scaling_factor,
    }
    actual = operation(given.logits, given.bias, topk=case.K, **rule)
    outputs = (actual.weights_TK, actual.probability_sum_E, actual.z_sum)
    followed = [(o, g) for o, g in zip(outputs, given.output_gradients, strict=True) if o.requires_grad]
    (d_logits,) = torch.autograd.grad(
        [o for o, _ in followed], given.logits, [g for _, g in followed], materialize_grads=True
    )
    assert torch.equal(given.logits, before), "an input was written into"
    _check_choice(actual, given, case)

    logits = before.double().requires_grad_()
    expected = routes_of_choice(logits, actual.experts_TK, **rule)
    (expected_d_logits,) = torch.autograd.grad(
        (expected.weights_TK, expected.probability_sum_E, expected.z_sum),
        logits,
        [gradient.double() for gradient in given.output_gradients],
    )
    bounds = _bounds(logits.detach(), expected, given, case, fused)
    for name, ours, theirs in (
        ("weights_TK", actual.weights_TK, expected.weights_TK),
        ("probability_sum_E", actual.probability_sum_E, expected.probability_sum_E),
        ("z_sum", actual.z_sum, expected.z_sum),
        ("d_logits_TE", d_logits, expected_d_logits),
    ):
        assert ours.dtype == torch.float32, f"{name}: {ours.dtype}, not torch.float32"
        assert_close(name, ours, theirs, roundings=1, noise=bounds[name])


def _check_choice(actual: Routes, given: RouteInputs, case: RouteCase) -> None:
    """Distinct experts, best first, none left out that is better by more than the scores are rounded."""
    experts_TK = actual.experts_TK.long()
    assert actual.experts_TK.dtype == actual.choices_E.dtype == torch.int32, "experts_TK, choices_E: not torch.int32"
    assert experts_TK.shape == (case.T, case.K), f"experts_TK: shape {tuple(experts_TK.shape)}"
    assert ((experts_TK >= 0) & (experts_TK < case.E)).all(), "experts_TK: no such expert"
    assert all(len(set(row)) == case.K for row in experts_TK.tolist()), "experts_TK: an expert twice"
    logits = given.logits.detach().double()
    is_sigmoid = case.score_function == "sigmoid"
    scores = logits.sigmoid() if is_sigmoid else logits.softmax(-1)
    rounding = INSIDE * scores * (1 + (logits.abs() if is_sigmoid else logits.amax(-1, keepdim=True) - logits))
    ranks = scores if given.bias is None else scores + given.bias.double()
    if given.bias is not None:
        rounding = rounding + INSIDE * (scores + given.bias.double().abs())
    best = ranks.topk(case.K, dim=-1)
    found = ranks.gather(1, experts_TK)
    allowed = rounding.gather(1, best.indices) + rounding.gather(1, experts_TK) + FLUSHED
    assert ((found - best.values).abs() <= allowed).all(), "experts_TK: not the best, or not in order"
    counts = torch.bincount(experts_TK.flatten(), minlength=case.E)
    assert torch.equal(actual.choices_E.long(), counts), "choices_E: not the counts of experts_TK"


@torch.no_grad()
def _bounds(logits: Tensor, expected: Routes, given: RouteInputs, case: RouteCase, fused: bool) -> dict[str, Tensor]:
    """How far each result may be off beyond one rounding. Everything is in fp64."""
    T, E = logits.shape
    experts = expected.experts_TK.long()
    factor = abs(1.0 if case.scaling_factor is None else case.scaling_factor)
    softmax = logits.softmax(-1)
    below_top = logits.amax(-1, keepdim=True) - logits if E else logits
    sums = FP32 * math.sqrt(max(1, E))
    # exp turns an error of its argument, relative in that, into one of |argument| times as much; so does the sum.
    of_power = INSIDE * (1 + below_top)
    of_softmax = of_power + (softmax * of_power).sum(-1, keepdim=True) + sums
    # The largest logit and the log of the sum are each rounded; the sum's own relative error is absolute in its log.
    logsumexp = logits.logsumexp(-1, keepdim=True)
    top = logits.amax(-1, keepdim=True)
    of_logsumexp = INSIDE * (1 + top.abs() + (logsumexp - top)) + (softmax * of_power).sum(-1, keepdim=True) + sums
    if case.score_function == "sigmoid":
        scores, of_score = logits.sigmoid(), INSIDE * (1 + logits.abs())
        probability = scores / (scores.sum(-1, keepdim=True) + 1e-20)
        of_probability = of_score + (probability * of_score).sum(-1, keepdim=True) + sums
    else:
        scores, of_score = softmax, of_softmax
        probability, of_probability = softmax, of_softmax

    chosen = torch.zeros_like(logits).scatter_(1, experts, 1.0)
    weights = chosen * scores
    of_weight = of_score
    if not case.pre_softmax:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        of_weight = of_score + (weights * of_score).sum(-1, keepdim=True) + INSIDE
    d_weights = torch.zeros_like(logits).scatter_(1, experts, given.d_weights.double().abs()) * factor
    d_probability = given.d_probability_sum.double().abs()
    d_z = given.d_z_sum.double().abs()

    def of_means(shares: Tensor, gradients: Tensor, of_share: Tensor) -> Tensor:
        """Error of shares * (gradients - sum of shares * gradients): of either term, of the sum and its roundings."""
        mean = (shares * gradients).sum(-1, keepdim=True)
        of_mean = (shares * gradients * of_share).sum(-1, keepdim=True) + (INSIDE + sums) * mean
        return shares * ((of_share + INSIDE) * (gradients + mean) + of_mean)

    if case.score_function == "sigmoid":
        # d_logit = d_score * score * (1 - score), of which the last is rounded as a difference.
        of_slope = of_score + INSIDE
        through = 1 - scores + of_slope
        if case.pre_softmax:
            d_logits = weights * d_weights * (of_slope * through + of_slope)
        else:
            own = weights * (d_weights + (weights * d_weights).sum(-1, keepdim=True))
            d_logits = of_means(weights, d_weights, of_weight) * through + own * of_slope
        shared = probability * (d_probability + (probability * d_probability).sum(-1, keepdim=True))
        d_logits = d_logits + of_means(probability, d_probability, of_probability) * through + shared * of_slope
    elif case.pre_softmax:
        d_logits = of_means(softmax, d_weights + d_probability, of_softmax)
    else:
        d_logits = of_means(weights, d_weights, of_weight) + of_means(softmax, d_probability, of_softmax)
    of_behind = of_softmax + INSIDE + (0 if fused else of_logsumexp)
    d_logits = d_logits + 2 * d_z * softmax * (logsumexp.abs() * of_behind + of_logsumexp)

    over_tokens = FP32 * math.sqrt(max(1, T))
    squares = logsumexp.square()
    return {
        "weights_TK": ((of_weight + INSIDE) * weights * factor).gather(1, experts),
        "probability_sum_E": (of_probability * probability).sum(0) + over_tokens * probability.square().sum(0).sqrt(),
        "z_sum": (2 * logsumexp.abs() * of_logsumexp + INSIDE * squares).sum()
        + over_tokens * squares.square().sum().sqrt(),
        "d_logits_TE": d_logits,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsInputs:
    """Arguments and the output gradient of one call."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    d_logits: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.weight] + ([] if self.bias is None else [self.bias])


def logits_inputs(case: LogitsCase, device: torch.device, seed: int = 0) -> LogitsInputs:
    """Random inputs of a case in bf16; the gradient spans magnitudes, as that of a softmax does."""
    generator = torch.Generator(device).manual_seed(seed)
    d_logits = random_tensor((case.T, case.E), torch.float32, generator)
    return LogitsInputs(
        x=random_tensor((case.T, case.H), BF16, generator).requires_grad_(),
        weight=random_tensor((case.E, case.H), BF16, generator, scale=0.1).requires_grad_(),
        bias=random_tensor((case.E,), BF16, generator).requires_grad_() if case.has_bias else None,
        d_logits=d_logits * random_tensor((case.T, case.E), torch.float32, generator).exp(),
    )


@poisoned_memory()
def check_router_logits(
    operation: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    case: LogitsCase,
    device: torch.device,
    *,
    main_gradient: Tensor | None = None,
    seed: int = 0,
) -> None:
    """Run `operation` forward and backward on a case; AssertionError names the first result that is off.

    With `main_gradient` the weight's gradient is expected there, added to zeros, in fp32.
    """
    given = logits_inputs(case, device, seed)
    logits = operation(given.x, given.weight, given.bias)
    actual = torch.autograd.grad(logits, given.leaves, given.d_logits, allow_unused=True)
    wide = [leaf.detach().double().requires_grad_() for leaf in given.leaves]
    expected_logits = torch.nn.functional.linear(wide[0], wide[1], wide[2] if case.has_bias else None)
    expected = torch.autograd.grad(expected_logits, wide, given.d_logits.double())
    assert logits.dtype == torch.float32, f"logits_TE: {logits.dtype}, not torch.float32"

    x, weight, d_logits = (t.detach().double() for t in (given.x, given.weight, given.d_logits))
    u = unit_roundoff(BF16, device)
    # Two halves leave u^2 of a gradient; a sum of n products in fp32, in whatever order, errs by sqrt(n) of its terms.
    of_halves = u * u + INSIDE
    # A tensor core adds 16 products at a time and cuts off behind the last bit it keeps, always downwards.
    in_steps = 2 * FP32 * REDUCTION * (1 + max(case.H / 16, math.sqrt(case.H)))
    forward = (INSIDE + in_steps) * (x.square() @ weight.square().t()).sqrt()
    noise = {
        "logits_TE": forward + (0 if given.bias is None else INSIDE * (expected_logits.detach().abs() + 1)),
        "dx_TH": (of_halves + FP32 * math.sqrt(case.E)) * (d_logits.abs() @ weight.abs()),
        "d_weight_EH": of_halves * (d_logits.abs().t() @ x.abs())
        + FP32 * math.sqrt(max(1, case.T)) * (d_logits.square().t() @ x.square()).sqrt(),
    }
    assert_close("logits_TE", logits, expected_logits, roundings=1, noise=noise["logits_TE"])
    assert_close("dx_TH", actual[0], expected[0], roundings=1, noise=noise["dx_TH"])
    if main_gradient is None:
        assert actual[1].dtype == BF16, f"d_weight_EH: {actual[1].dtype}, not {BF16}"
    else:
        assert actual[1] is None, "d_weight_EH: autograd was given what belongs to the main gradient"
    d_weight = actual[1] if main_gradient is None else main_gradient
    assert_close("d_weight_EH", d_weight, expected[1], roundings=1, noise=noise["d_weight_EH"])
    if given.bias is not None:
        of_sum = (INSIDE + FP32 * math.sqrt(max(1, case.T))) * d_logits.square().sum(0).sqrt()
        assert_close("d_bias_E", actual[2], expected[2], roundings=1, noise=of_sum)
