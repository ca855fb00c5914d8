"""The oracle of the experts: the output and every gradient against fp64, an expert at a time, within derived bounds.

Beside each value of the computation goes `off`: by how much it may be off, given what it is made of. A product of
values that are off by independent amounts is off by the root of the sum of squares, times a safe number of deviations
(REDUCTION); a function's value by its slope times what its argument is off by; and each rounding adds its own.
"""

# Shapes: T tokens, K top-k, E experts, H hidden_size, F ffn width, O rows of fc1, R rows of the expert at hand.

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ckptbridge.kernels.activation import fc1_outputs
from ckptbridge.kernels.main_gradient import MainGradient, main_gradient_of, set_main_gradient
from ckptbridge.kernels.order import Order
from tests.kernels.cases import FP32, random_tensor
from tests.kernels.cases_experts import ExpertsCase, order_of, random_choices
from tests.kernels.poison import poisoned_memory
from tests.kernels.tolerances import FP32 as FP32_ROUNDOFF
from tests.kernels.tolerances import INSIDE, REDUCTION, assert_close, unit_roundoff

Experts = Callable[[Tensor, Tensor, Order, Tensor, Tensor, str], Tensor]

MAIN_GRADIENTS = (None, "overwritten", "added to")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsInputs:
    """Arguments of one call and its output's gradient."""

    x: Tensor
    weights: Tensor
    fc1: Tensor
    fc2: Tensor
    order: Order
    d_out: Tensor

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {"dx": self.x, "dweights": self.weights, "dfc1": self.fc1, "dfc2": self.fc2}


def experts_inputs(case: ExpertsCase, device: torch.device, seed: int = 0) -> ExpertsInputs:
    """Random inputs of a case; matrices keep the size of what passes them."""
    host = torch.Generator().manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = case.dtype) -> Tensor:
        return random_tensor(shape, dtype, generator, scale=scale, aligned=case.aligned)

    outputs = fc1_outputs(case.activation, case.F)
    return ExpertsInputs(
        x=draw(case.T, case.H).requires_grad_(),
        weights=draw(case.T, case.K, dtype=FP32).abs_().requires_grad_(),
        fc1=draw(case.E, outputs, case.H, scale=case.H**-0.5).requires_grad_(),
        fc2=draw(case.E, case.H, case.F, scale=case.F**-0.5).requires_grad_(),
        order=order_of(case, random_choices(case, host), device),
        d_out=draw(case.T, case.H),
    )


@poisoned_memory()
def check_experts(
    operation: Experts, case: ExpertsCase, device: torch.device, *, main_gradient: str | None = None, seed: int = 0
) -> None:
    """Run `operation` forward and backward on a case; AssertionError names the first result that is off.

    With `main_gradient` the matrices have one, which holds numbers to add to, or NaN to overwrite.
    """
    given = experts_inputs(case, device, seed)
    before = {name: leaf.detach().clone() for name, leaf in given.leaves.items()}
    earlier = _main_gradients(given, main_gradient)
    out = operation(given.x, given.weights, given.order, given.fc1, given.fc2, case.activation)
    gradients = torch.autograd.grad(out, list(given.leaves.values()), given.d_out, allow_unused=True)
    actual = dict(zip(given.leaves, gradients, strict=True))
    for name, leaf in given.leaves.items():
        assert torch.equal(leaf, before[name]), "an input was written into"
        if (main := main_gradient_of(leaf)) is None:
            gradient = actual[name] if actual[name] is not None else torch.zeros_like(leaf)
            assert gradient.dtype == leaf.dtype, f"{name}: {gradient.dtype}, not {leaf.dtype}"
            actual[name] = gradient
        else:
            assert actual[name] is None, f"{name}: autograd was given a gradient beside the main gradient's"
            assert main.is_filled, f"{name}: the main gradient does not count as filled"
            actual[name] = main.tensor
    assert out.dtype == case.dtype, f"out: {out.dtype}, not {case.dtype}"
    with torch.no_grad():
        _compare(case, given, {"out": out.detach(), **actual}, earlier)


def _main_gradients(given: ExpertsInputs, main_gradient: str | None) -> dict[str, Tensor]:
    """Give the matrices their main gradients; returns what these held before and what counts."""
    earlier = {}
    if main_gradient is not None:
        for name, weight in (("dfc1", given.fc1), ("dfc2", given.fc2)):
            tensor = torch.full_like(weight, math.nan, dtype=FP32, requires_grad=False)
            if main_gradient == "added to":
                earlier[name] = tensor.copy_(weight.detach()).clone()
            set_main_gradient(weight, MainGradient(tensor))
            main_gradient_of(weight).is_filled = main_gradient == "added to"
    return earlier


def _compare(case: ExpertsCase, given: ExpertsInputs, actual: dict[str, Tensor], earlier: dict[str, Tensor]) -> None:
    u = unit_roundoff(case.dtype, given.x.device)
    # Triton's interpreter cuts off where a GPU rounds to nearest: what it is off by does not average out.
    drift = 0.0 if given.x.is_cuda else 3 * u
    rows_of = _rows_of_experts(given.order)
    sums = {name: torch.zeros(case.T, case.H, dtype=torch.float64, device=given.x.device) for name in ("out", "dx")}
    offs = {name: torch.zeros_like(total) for name, total in sums.items()}
    d_weights = torch.zeros(case.T, case.K, dtype=torch.float64, device=given.x.device)
    d_weights_off = torch.zeros_like(d_weights)
    for expert, (tokens, choices) in enumerate(rows_of):
        one = _Expert(case.activation, u, given, expert, tokens, choices)
        for name, (value, off) in (("out", one.out()), ("dx", one.dx())):
            sums[name].index_add_(0, tokens, value)
            offs[name].index_add_(0, tokens, off)
        d_weights[tokens, choices], d_weights_off[tokens, choices] = one.d_weights()
        for name, (value, off) in (("dfc1", one.d_fc1()), ("dfc2", one.d_fc2())):
            value += earlier[name][expert].double() if name in earlier else 0
            noise = off + drift * value.abs()
            assert_close(f"{name} of expert {expert}", actual[name][expert], value, roundings=1, noise=noise)
    for name, expected in sums.items():
        assert_close(name, actual[name], expected, roundings=1, noise=offs[name] + drift * expected.abs())
    noise = d_weights_off + drift * d_weights.abs()
    assert_close("dweights", actual["dweights"], d_weights, roundings=1, noise=noise)


def _rows_of_experts(order: Order) -> list[tuple[Tensor, Tensor]]:
    """For each expert the tokens of its rows, and which of their choices they are: rows of padding left out."""
    starts = torch.cat([order.ends_E.new_zeros(1), order.ends_E[:-1]])
    found = []
    for start, end in zip(starts.tolist(), order.ends_E.tolist(), strict=True):
        tokens, choices = ((order.rows_TK >= start) & (order.rows_TK < end)).nonzero(as_tuple=True)
        found.append((tokens, choices))
    return found


class _Expert:
    """One expert's part of everything, in fp64: pairs of a value and by how much it may be off."""

    def __init__(
        self, activation: str, u: float, given: ExpertsInputs, expert: int, tokens: Tensor, choices: Tensor
    ) -> None:
        self.u = u
        self.x_RH, self.d_RH = given.x[tokens].double(), given.d_out[tokens].double()
        self.weights_R1 = given.weights[tokens, choices].double().unsqueeze(-1)
        self.fc1_OH, self.fc2_HF = given.fc1[expert].double(), given.fc2[expert].double()
        h_RO = self._rounded(*self._product(self.x_RH, None, self.fc1_OH.t()))
        d_RF = self._rounded(*self._product(self.d_RH, None, self.fc2_HF))
        function = _swiglu if activation == "swiglu" else _squared_relu
        self.hidden_RF, hidden_off, d_h, d_h_off = function(*h_RO, *d_RF)
        self.hidden_off = hidden_off + INSIDE * self.hidden_RF.abs()
        self.d_RF = d_RF
        self.d_h_RO = self._rounded(self.weights_R1 * d_h, self.weights_R1 * d_h_off)

    def out(self) -> tuple[Tensor, Tensor]:
        hidden = self._rounded(self.hidden_RF, self.hidden_off)
        value, off = self._rounded(*self._product(*hidden, self.fc2_HF.t()))
        return self.weights_R1 * value, self.weights_R1 * off

    def dx(self) -> tuple[Tensor, Tensor]:
        return self._rounded(*self._product(*self.d_h_RO, self.fc1_OH))

    def d_weights(self) -> tuple[Tensor, Tensor]:
        d, off = self.d_RF
        terms_off = ((self.hidden_RF * off).square() + (d * self.hidden_off).square()).sum(-1).sqrt()
        inside = (INSIDE + FP32_ROUNDOFF * math.sqrt(d.shape[-1])) * (d * self.hidden_RF).square().sum(-1).sqrt()
        return (d * self.hidden_RF).sum(-1), REDUCTION * terms_off + inside

    def d_fc1(self) -> tuple[Tensor, Tensor]:
        value, off = self.d_h_RO
        return self._product(value.t(), off.t(), self.x_RH)

    def d_fc2(self) -> tuple[Tensor, Tensor]:
        weighted = self._rounded(self.weights_R1 * self.hidden_RF, self.weights_R1 * self.hidden_off)
        value, off = self._product(*(part.t() for part in weighted), self.d_RH)
        return value.t(), off.t()

    def _rounded(self, value: Tensor, off: Tensor) -> tuple[Tensor, Tensor]:
        return value, off + self.u * value.abs()

    def _product(self, a: Tensor, off: Tensor | None, b: Tensor) -> tuple[Tensor, Tensor]:
        """a @ b, summed in fp32, of which a may be off."""
        squares = b.square()
        inside = (INSIDE + FP32_ROUNDOFF * math.sqrt(a.shape[1])) * (a.square() @ squares).sqrt()
        return a @ b, inside if off is None else inside + REDUCTION * (off.square() @ squares).sqrt()


def _swiglu(h: Tensor, h_off: Tensor, d: Tensor, d_off: Tensor) -> tuple[Tensor, ...]:
    """Hidden units, by how much they are off, the gradient of h without the weight, by how much it is off."""
    (gate_proj, up_proj), (gate_off, up_off) = h.chunk(2, -1), h_off.chunk(2, -1)
    sigmoid = gate_proj.sigmoid()
    silu, slope = gate_proj * sigmoid, sigmoid * (1 + gate_proj * (1 - sigmoid))
    bend = sigmoid * (1 - sigmoid) * (2 + gate_proj * (1 - 2 * sigmoid))
    hidden_off = (slope * up_proj).abs() * gate_off + silu.abs() * up_off + gate_off * up_off
    # exp turns an error of its argument, relative in that, into one of |gate_proj| times as much.
    inside = INSIDE * (1 + gate_proj.abs())
    d_gate, d_up = d * up_proj * slope, d * silu
    d_gate_off = (up_proj * slope).abs() * d_off + (d * slope).abs() * up_off + (d * up_proj * bend).abs() * gate_off
    d_up_off = silu.abs() * d_off + (d * slope).abs() * gate_off
    # The bracket of the slope can cancel.
    d_gate_off += inside * (d * up_proj * sigmoid).abs()
    d_h_off = torch.cat([d_gate_off, d_up_off + inside * d_up.abs()], -1)
    return silu * up_proj, hidden_off + inside * (silu * up_proj).abs(), torch.cat([d_gate, d_up], -1), d_h_off


def _squared_relu(h: Tensor, h_off: Tensor, d: Tensor, d_off: Tensor) -> tuple[Tensor, ...]:
    positive = h.relu()
    hidden_off = 2 * positive * h_off + h_off.square()
    d_h = 2 * d * positive
    return positive.square(), hidden_off, d_h, 2 * positive * d_off + 2 * d.abs() * h_off + INSIDE * d_h.abs()
