"""adam_step: the definition against torch's AdamW, every backend against the definition in fp64, and rounding."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from ckptbridge.kernels.adam import AdamConfig, adam_step, adam_step_reference
from ckptbridge.kernels.stochastic_rounding import stochastic_bf16
from tests.kernels.cases import BF16, FP32
from tests.kernels.cases_adam import SMALL_ADAM, AdamCase
from tests.kernels.oracle_adam import adam_inputs, check_adam


def scalar(value: float, device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device=device)


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)])
def test_the_definition_is_torch_adamw(betas: tuple[float, float]) -> None:
    generator = torch.Generator().manual_seed(1)
    main = torch.randn(50, dtype=torch.float64, generator=generator)
    theirs = main.clone().requires_grad_()
    adam = torch.optim.AdamW([theirs], lr=1e-2, betas=betas, eps=1e-3, weight_decay=0.2, foreach=False)
    exp_avg, exp_avg_sq = torch.zeros_like(main), torch.zeros_like(main)
    for step in range(1, 8):
        gradient = torch.randn(50, dtype=torch.float64, generator=generator)
        theirs.grad = 0.25 * gradient
        adam.step()
        adam_step_reference(
            gradient,
            main,
            exp_avg,
            exp_avg_sq,
            None,
            lr=scalar(1e-2),
            step=scalar(step),
            coefficient=scalar(0.25),
            betas=betas,
            eps=1e-3,
            weight_decay=0.2,
        )
    torch.testing.assert_close(main, theirs.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(exp_avg_sq, adam.state[theirs]["exp_avg_sq"], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("case", SMALL_ADAM, ids=str)
def test_step_equals_fp64(case, backend, device):
    check_adam(partial(adam_step, backend=backend), case, device)


@pytest.mark.parametrize("case", [case for case in SMALL_ADAM if case.moments == FP32], ids=str)
def test_torch_backend_equals_fp64(case, device):
    check_adam(partial(adam_step, backend="torch"), case, device, is_torchs=True)


def test_other_launch_knobs_give_the_same_bits(device):
    results = []
    for config in (AdamConfig(), AdamConfig(block=256, num_warps=2)):
        given = adam_inputs(AdamCase(n=3000, moments=BF16), device)
        adam_step(*given.tensors, **given.options, backend="triton", config=config)
        results.append(given.tensors)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_range_of_the_buffers_gives_the_bits_of_the_whole(backend, device):
    """What a shard of a group computes does not depend on where it was cut."""
    whole = adam_inputs(AdamCase(n=3000, moments=BF16), device)
    adam_step(*whole.tensors, **whole.options, backend=backend)
    cut = adam_inputs(AdamCase(n=3000, moments=BF16), device)
    for rows in (slice(0, 1280), slice(1280, 3000)):
        options = cut.options | {"first": rows.start}
        adam_step(*(tensor[rows] for tensor in cut.tensors), **options, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(whole.tensors, cut.tensors, strict=True))


def test_it_reads_its_scalars_anew_at_every_call(device):
    """As a captured graph does: the same tensors, other values."""
    given = adam_inputs(AdamCase(n=100), device)
    for key, value in (("lr", 5e-2), ("step", 7), ("coefficient", 0.9)):
        given.options[key].fill_(value)
    expected = adam_inputs(AdamCase(n=100, lr=5e-2, step=7, coefficient=0.9), device)
    for one in (given, expected):
        adam_step(*one.tensors, **one.options, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(given.tensors, expected.tensors, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("moments", [FP32, BF16])
def test_a_replayed_graph_takes_new_scalars(moments, device):
    cases = [AdamCase(n=5000, moments=moments, step=step, lr=1e-3 / step, coefficient=0.1 * step) for step in (1, 2, 3)]
    eager, replayed = (adam_inputs(cases[0], device) for _ in range(2))
    for case in cases:
        adam_step(*eager.tensors, **(eager.options | _scalars(case, device)), backend="triton")
    keep = [tensor.clone() for tensor in replayed.tensors]
    adam_step(*replayed.tensors, **replayed.options, backend="triton")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adam_step(*replayed.tensors, **replayed.options, backend="triton")
    for tensor, kept in zip(replayed.tensors, keep, strict=True):
        tensor.copy_(kept)
    for case in cases:
        for key, value in _scalars(case, device).items():
            replayed.options[key].copy_(value)
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(eager.tensors, replayed.tensors, strict=True))


def _scalars(case: AdamCase, device: torch.device) -> dict[str, Tensor]:
    values = {"lr": case.lr, "step": case.step, "coefficient": case.coefficient}
    return {key: torch.tensor(value, dtype=FP32, device=device) for key, value in values.items()}


# Rounding at random.


def test_numbers_go_to_a_neighbour_and_their_mean_stays(device):
    n = 1 << 16
    for value in (1.0 + 2**-8, 1.0 + 2**-10, 3.1415927, 1.2345e-30, -7.77e20):
        rounded = stochastic_bf16(torch.full((n,), value, device=device), scalar(5, device)).double()
        exact = torch.tensor(value, dtype=FP32).double().item()
        low, high = rounded.min().item(), rounded.max().item()
        spacing = high - low
        assert low < exact < high
        assert spacing <= 2**-7 * abs(exact)
        # n draws of a coin: 5 standard deviations of the mean.
        assert abs(rounded.mean().item() - exact) <= 5 * spacing / 2 / n**0.5
    for value in (0.0, 1.0, -0.15625, 2.0**-126, float("inf"), float("-inf")):
        assert (stochastic_bf16(torch.full((n,), value, device=device), scalar(5, device)) == value).all()
    assert stochastic_bf16(torch.tensor([float("nan")] * 99, device=device), scalar(5, device)).isnan().all()


def test_neighbours_and_steps_are_independent(device):
    n = 1 << 16
    x = torch.full((n,), 1.0 + 2**-8, device=device)  # halfway
    signs = [torch.where(stochastic_bf16(x, scalar(step, device)) > 1, 1.0, -1.0) for step in range(1, 6)]
    signs.append(torch.where(stochastic_bf16(x, scalar(1, device), 2**32) > 1, 1.0, -1.0))
    pairs = [(a, b) for i, a in enumerate(signs) for b in signs[:i]]
    pairs += [(a[:-lag], a[lag:]) for a in signs for lag in (1, 2, 4, 32, 128, 1024)]
    for a, b in pairs:
        assert abs((a * b).mean().item()) <= 5 / n**0.5


def test_the_kernel_draws_the_bits_of_the_definition(device):
    """Where the two differ in the last bit of fp32, one in 65,536 rounds to the other side."""
    case = AdamCase(n=20_000, moments=BF16, first=2**33 - 7000)
    one, other = (adam_inputs(case, device) for _ in range(2))
    adam_step(*one.tensors, **one.options, backend="reference")
    adam_step(*other.tensors, **other.options, backend="triton")
    assert (one.tensors[3] != other.tensors[3]).sum() <= 5


def _decayed(device: torch.device, round_to_bf16, steps: int = 1500) -> float:
    """A mean square of 1 after gradients of zero at beta2 = 0.999: what is left of it, relative to the exact value."""
    held = torch.ones(4096, device=device)
    for step in range(1, steps + 1):
        held = round_to_bf16(held * 0.999, step).float()
    return held.mean().item() / 0.999**steps


def test_a_mean_square_in_bf16_decays_as_in_fp32_and_rounded_to_nearest_it_would_not(device):
    assert _decayed(device, lambda x, step: stochastic_bf16(x, scalar(step, device))) == pytest.approx(1, rel=0.02)
    assert _decayed(device, lambda x, step: x.bfloat16()) > 4


# Planted faults: each computes something else than the definition, and the oracle must say so.


def _no_bias_correction(*tensors, step, **options):
    adam_step(*tensors, step=torch.full_like(step, 1e9), **options)


def _step_counted_from_zero(*tensors, step, **options):
    adam_step(*tensors, step=step - 1, **options)


def _not_decayed(*tensors, weight_decay, **options):
    adam_step(*tensors, weight_decay=0.0, **options)


def _decay_through_the_gradient(gradient, main, *tensors, weight_decay, **options):
    adam_step(gradient + weight_decay * main, main, *tensors, weight_decay=0.0, **options)


def _decay_behind_the_move(gradient, main, *tensors, lr, weight_decay, **options):
    adam_step(gradient, main, *tensors, lr=lr, weight_decay=0.0, **options)
    main.mul_(1 - lr * weight_decay)


def _clipped_behind_the_moments(gradient, main, exp_avg, exp_avg_sq, weight, *, lr, coefficient, **options):
    adam_step(gradient, main, exp_avg, exp_avg_sq, weight, lr=lr * coefficient, coefficient=None, **options)


def _not_clipped(*tensors, coefficient, **options):
    adam_step(*tensors, coefficient=None, **options)


def _eps_inside_the_root(gradient, main, exp_avg, exp_avg_sq, weight, *, eps, **options):
    old = main.clone()
    adam_step(gradient, main, exp_avg, exp_avg_sq, weight, eps=eps, **options)
    lr, (beta1, beta2) = options["lr"], options["betas"]
    mean, square = exp_avg / (1 - beta1 ** options["step"]), exp_avg_sq / (1 - beta2 ** options["step"])
    main.copy_(old * (1 - lr * options["weight_decay"]) - lr * mean / (square + eps).sqrt())
    weight.copy_(main)


def _moments_swapped(gradient, main, exp_avg, exp_avg_sq, weight, **options):
    adam_step(gradient, main, exp_avg_sq, exp_avg.abs_(), weight, **options)


def _betas_swapped(*tensors, betas, **options):
    adam_step(*tensors, betas=betas[::-1], **options)


def _weight_not_written(gradient, main, exp_avg, exp_avg_sq, weight, **options):
    adam_step(gradient, main, exp_avg, exp_avg_sq, None, **options)


def _main_weight_rounded(gradient, main, exp_avg, exp_avg_sq, weight, **options):
    adam_step(gradient, main, exp_avg, exp_avg_sq, weight, **options)
    main.copy_(main.bfloat16())


def _last_element_left_out(*tensors, **options):
    adam_step(*(tensor[:-1] for tensor in tensors), **options)


@pytest.mark.parametrize(
    ("fault", "caught_as"),
    [
        (_no_bias_correction, "main"),
        (_step_counted_from_zero, "main"),
        (_not_decayed, "main"),
        (_decay_through_the_gradient, "exp_avg"),
        (_decay_behind_the_move, "main"),
        (_clipped_behind_the_moments, "exp_avg"),
        (_not_clipped, "exp_avg"),
        (_eps_inside_the_root, "main"),
        (_moments_swapped, "exp_avg"),
        (_betas_swapped, "exp_avg"),
        (_weight_not_written, "weight"),
        (_main_weight_rounded, "main"),
        (_last_element_left_out, "exp_avg"),
    ],
)
def test_oracle_catches(fault, caught_as, device):
    case = AdamCase(n=500, lr=1e-2, eps=1e-4)
    check_adam(adam_step, case, device)
    with pytest.raises(AssertionError, match=f"^{caught_as}"):
        check_adam(fault, case, device)


def test_oracle_catches_a_mean_square_in_bf16_that_is_a_spacing_off(device):
    def rounded_up(gradient, main, exp_avg, exp_avg_sq, weight, **options):
        adam_step(gradient, main, exp_avg, exp_avg_sq, weight, **options)
        exp_avg_sq.copy_(torch.nextafter(exp_avg_sq, torch.full_like(exp_avg_sq, float("inf"))))

    with pytest.raises(AssertionError, match="exp_avg_sq"):
        check_adam(rounded_up, AdamCase(n=500, moments=BF16), device)


def test_arguments_that_do_not_fit():
    given = adam_inputs(AdamCase(n=8), torch.device("cpu"))
    gradient, main, exp_avg, exp_avg_sq, weight = given.tensors

    def refused(match: str, *tensors: Tensor | None, **options: object) -> None:
        with pytest.raises(ValueError, match=match):
            adam_step(*tensors, **(given.options | options))

    refused(r"gradient: expected dtype torch.float32, found .*bfloat16", weight, main, exp_avg, exp_avg_sq)
    refused(r"exp_avg_sq: expected dtype torch.float32 of exp_avg", gradient, main, exp_avg, exp_avg_sq.bfloat16())
    refused(r"weight: expected shape \(8,\) \(that of main\), found \(4,\)", *given.tensors[:4], weight[:4])
    refused(r"exp_avg: expected a contiguous tensor", gradient, main, exp_avg.repeat(2)[::2], exp_avg_sq)
    refused(r"lr: expected a scalar tensor, found shape \(2,\)", *given.tensors, lr=torch.ones(2))
    refused(r"backend: expected one of reference", *given.tensors, backend="cuda")
    refused(
        r"exp_avg: the torch backend expects dtype torch.float32",
        *(gradient, main, exp_avg.bfloat16(), exp_avg_sq.bfloat16()),
        backend="torch",
    )
