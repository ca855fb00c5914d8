"""linear_cross_entropy: chunks and gradients against fp64, promises kept and broken, an oracle that sees faults."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from ckptbridge.kernels.cross_entropy import (
    CrossEntropyConfig,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    token_losses,
    token_losses_reference,
)
from ckptbridge.kernels.main_gradient import MainGradient, set_main_gradient
from tests.kernels.cases import FP32
from tests.kernels.cases_cross_entropy import (
    REAL_CROSS_ENTROPY,
    REAL_TOKEN_LOSSES,
    SMALL_CROSS_ENTROPY,
    SMALL_TOKEN_LOSSES,
    CrossEntropyCase,
    TokenLossCase,
)
from tests.kernels.oracle_cross_entropy import (
    check_cross_entropy,
    check_token_losses,
    cross_entropy_inputs,
    token_loss_inputs,
)

ON_GPU = torch.cuda.is_available()
TOKEN_LOSSES = SMALL_TOKEN_LOSSES + (REAL_TOKEN_LOSSES if ON_GPU else [])
CASES = SMALL_CROSS_ENTROPY + (REAL_CROSS_ENTROPY if ON_GPU else [])
BACKENDS = ["reference", "triton"]


def of_tokens(backend: str, config: CrossEntropyConfig | None = None):
    def operation(logits: Tensor, targets: Tensor, divisor: float | None) -> Tensor:
        knobs = config or CrossEntropyConfig.from_shape(logits.shape[1])
        return token_losses(logits, targets, divisor, backend, knobs)

    return operation


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", TOKEN_LOSSES, ids=str)
def test_a_chunk_equals_fp64(case, backend, device):
    check_token_losses(of_tokens(backend), case, device)


@pytest.mark.parametrize(("block_width", "num_warps"), [(64, 1), (1024, 8), (8192, 8)])
def test_other_launch_knobs_give_the_same_numbers(block_width, num_warps, device):
    config = CrossEntropyConfig(block_width=block_width, num_warps=num_warps)
    check_token_losses(of_tokens("triton", config), TokenLossCase(C=3, V=2049), device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_equal_fp64(case, backend, device):
    operation = partial(linear_cross_entropy, backend=backend, chunk_tokens=case.chunk)
    check_cross_entropy(operation, case, device)


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gradient", [1.0, -3.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_gradient_reaches_the_main_gradient(backend, gradient, dtype, device):
    case = CrossEntropyCase(T=37, H=24, V=99, dtype=dtype)
    operation = partial(linear_cross_entropy, backend=backend, chunk_tokens=16)
    check_cross_entropy(operation, case, device, gradient=gradient)
    check_cross_entropy(operation, case, device, gradient=gradient, main=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("main", [False, True], ids=["own", "main"])
def test_a_kept_promise(main, backend, device):
    operation = partial(linear_cross_entropy, backend=backend, chunk_tokens=16, starts_backward=True)
    check_cross_entropy(operation, CrossEntropyCase(T=37, H=24, V=99), device, main=main)


def test_a_broken_promise_is_an_error():
    """On a CPU. A GPU's device assertion would leave the process without a GPU."""
    given = cross_entropy_inputs(CrossEntropyCase(T=5, H=8, V=9, dtype=FP32), torch.device("cpu"))
    loss = linear_cross_entropy(given.hidden, given.weight, given.targets, starts_backward=True)
    with pytest.raises(ValueError, match=r"expected the gradient 1 that starts_backward promised; .* found 2\.0"):
        (2 * loss).backward()


def test_the_main_gradient_waits_for_the_backward_pass(device):
    given = cross_entropy_inputs(CrossEntropyCase(T=5, H=8, V=9), device)
    main = MainGradient(torch.zeros(9, 8, device=device))
    set_main_gradient(given.weight, main)
    linear_cross_entropy(given.hidden, given.weight, given.targets)
    assert not main.is_filled
    with torch.no_grad():
        loss = linear_cross_entropy(given.hidden, given.weight, given.targets, starts_backward=True)
    assert not main.is_filled
    assert not loss.requires_grad


def test_micro_batches_add_up(device):
    """Two halves over one divisor are the whole, in loss and in main gradient."""
    given = cross_entropy_inputs(CrossEntropyCase(T=32, H=16, V=50, dtype=FP32), device)
    sums, losses = [], []
    for parts in (1, 2):
        main = MainGradient(torch.full((50, 16), float("nan"), device=device))
        set_main_gradient(given.weight, main)
        total = 0.0
        for hidden, targets in zip(given.hidden.chunk(parts), given.targets.chunk(parts), strict=True):
            loss = linear_cross_entropy(hidden, given.weight, targets, 32, starts_backward=True, backend="triton")
            loss.backward()
            total += loss.item()
        sums.append(main.finish())
        losses.append(total)
    torch.testing.assert_close(sums[0], sums[1])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("leaf", ["hidden", "weight"])
def test_one_gradient_alone(leaf, device):
    given = cross_entropy_inputs(CrossEntropyCase(T=7, H=8, V=33, dtype=FP32), device)
    wanted = {name: getattr(given, name).detach().requires_grad_(name == leaf) for name in ("hidden", "weight")}
    loss = linear_cross_entropy(wanted["hidden"], wanted["weight"], given.targets, backend="triton")
    expected = linear_cross_entropy_reference(wanted["hidden"], wanted["weight"], given.targets, 1.0)
    pair = (torch.autograd.grad(value, wanted[leaf])[0] for value in (loss, expected))
    torch.testing.assert_close(*pair)


def test_repeated_runs_give_the_same_bits(device):
    results = []
    for _ in range(2):
        given = cross_entropy_inputs(CrossEntropyCase(T=70, H=16, V=300), device)
        loss = linear_cross_entropy(given.hidden, given.weight, given.targets, backend="triton", chunk_tokens=16)
        results.append((loss.detach(), *torch.autograd.grad(loss, (given.hidden, given.weight))))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("backend", BACKENDS)
def test_unlikely_targets_keep_their_precision(backend, device):
    """A target 200 nats below the best one: its probability underflows in fp32, its logarithm must not."""
    hidden = torch.tensor([[1.0, 0.0]], device=device)
    weight = torch.tensor([[200.0, 0.0], [0.0, 0.0]], device=device)
    targets = torch.tensor([1], device=device)
    assert linear_cross_entropy(hidden, weight, targets, backend=backend).item() == 200.0


def test_bf16_gradients_are_summed_in_fp32(device):
    """Chunks of one token: 512 equal gradients summed in bf16 would stop growing at 256 of them."""
    hidden = torch.ones(512, 1, dtype=torch.bfloat16, device=device)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, device=device, requires_grad=True)
    targets = torch.zeros(512, dtype=torch.long, device=device)
    linear_cross_entropy(hidden, weight, targets, chunk_tokens=1).backward()
    assert weight.grad.flatten().tolist() == [-256.0, 256.0]


# The interpreter's numpy remarks on infinity less infinity.
@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_logits_and_targets_show(bad, device):
    config = CrossEntropyConfig.from_shape(40)
    logits, targets = token_loss_inputs(TokenLossCase(C=4, V=40), device)
    logits[0, 7], targets[2], targets[3] = bad, 40, -1
    losses = token_losses(logits, targets, None, "triton", config)
    assert losses.isnan().tolist() == [True, False, True, True]


@pytest.mark.slow  # torch.compile takes 10 to 75 s on two cores
# torch.compile's own import deprecates a function of torch.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_torch_backend_equals_fp64(device):
    check_token_losses(of_tokens("torch"), TokenLossCase(C=4, V=577), device)


# Planted faults: each computes something else than the definition, and the oracle must say so.


def _tokens(change):
    def operation(logits, targets, divisor):
        losses, gradient = change(logits, targets, divisor)
        logits.copy_(gradient)
        return losses

    return operation


def _target_not_subtracted(logits, targets, divisor):
    losses, _ = token_losses_reference(logits, targets, divisor)
    return losses, logits.float().softmax(1) / divisor


def _last_word_not_summed(logits, targets, divisor):
    shorter = torch.cat([logits[:, :-1], torch.full_like(logits[:, :1], -1e4)], 1)
    return token_losses_reference(shorter, targets.clamp(max=logits.shape[1] - 2), divisor)


def _word_behind_the_row_summed(logits, targets, divisor):
    losses, gradient = token_losses_reference(torch.cat([logits, 0 * logits[:, :1]], 1), targets, divisor)
    return losses, gradient[:, :-1]


def _divisor_dropped(logits, targets, divisor):
    return token_losses_reference(logits, targets, 1.0)


def _targets_of_the_next_row(logits, targets, divisor):
    return token_losses_reference(logits, targets.roll(1), divisor)


def _last_gradient_not_written(logits, targets, divisor):
    losses, gradient = token_losses_reference(logits, targets, divisor)
    gradient[-1, -1] = logits[-1, -1]
    return losses, gradient


@pytest.mark.parametrize(
    ("fault", "caught_as"),
    [
        (_target_not_subtracted, "d_logits"),
        (_last_word_not_summed, "losses"),
        (_word_behind_the_row_summed, "losses"),
        (_divisor_dropped, "d_logits"),
        (_targets_of_the_next_row, "losses"),
        (_last_gradient_not_written, "d_logits"),
    ],
)
def test_oracle_of_a_chunk_catches(fault, caught_as, device):
    case = TokenLossCase(C=4, V=99)
    check_token_losses(_tokens(token_losses_reference), case, device)
    with pytest.raises(AssertionError, match=caught_as):
        check_token_losses(_tokens(fault), case, device)


def _weight_gradient_dropped(hidden, weight, targets, divisor):
    return linear_cross_entropy(hidden, weight.detach() + 0 * weight, targets, divisor)


def _last_chunk_missing(hidden, weight, targets, divisor):
    return linear_cross_entropy(hidden[:-1], weight, targets[:-1], divisor)


def _last_token_missing_from_dweight(hidden, weight, targets, divisor):
    first = linear_cross_entropy(hidden[:-1], weight, targets[:-1], divisor)
    return first + linear_cross_entropy(hidden[-1:], weight.detach(), targets[-1:], divisor)


def _mean_of_chunks(hidden, weight, targets, divisor):
    losses = [
        linear_cross_entropy(h, weight, t, len(t)) for h, t in zip(hidden.split(16), targets.split(16), strict=True)
    ]
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    ("fault", "caught_as"),
    [
        (_weight_gradient_dropped, "dweight"),
        (_last_chunk_missing, "loss"),
        (_last_token_missing_from_dweight, "dweight"),
        (_mean_of_chunks, "loss"),
    ],
)
def test_oracle_catches(fault, caught_as, device):
    case = CrossEntropyCase(T=37, H=24, V=99, dtype=FP32)
    check_cross_entropy(linear_cross_entropy_reference, case, device)
    with pytest.raises(AssertionError, match=caught_as):
        check_cross_entropy(fault, case, device)


def test_arguments_that_do_not_fit():
    hidden, weight, targets = torch.zeros(4, 8), torch.zeros(9, 8), torch.zeros(4, dtype=torch.long)

    def refused(match: str, *arguments, **keywords):
        with pytest.raises(ValueError, match=match):
            linear_cross_entropy(*arguments, **keywords)

    refused(r"hidden_TH: expected \[T, H\], found shape \(2, 2, 8\)", hidden.view(2, 2, 8), weight, targets)
    refused(r"weight_VH: expected shape \(9, 8\) \(\[V, width of hidden_TH\]\)", hidden, torch.zeros(9, 7), targets)
    refused(r"weight_VH: expected dtype torch.float32 of hidden_TH", hidden, weight.bfloat16(), targets)
    refused(r"targets_T: expected shape \(4,\) \(one for each row of hidden_TH\)", hidden, weight, targets[:3])
    refused(r"targets_T: expected torch.int64 on cpu, found torch.int32 on cpu", hidden, weight, targets.int())
    refused(r"backend: expected one of reference, .* found 'cuda'", hidden, weight, targets, backend="cuda")
