"""The Triton kernels of `routing`: rows of logits are held whole, and everything is computed from them in one pass."""

# Shapes: T tokens, E experts, K top-k, P programs, each with its own partial sums.

from __future__ import annotations

from ckptbridge.kernels.backend import jit, tl


@jit
def _load_logits(logits_ptr, rows, columns, T, E: tl.constexpr):
    """A tile of logits; minus infinity in the columns of no expert, zero in the rows of no token."""
    offsets = rows.to(tl.int64)[:, None] * E + columns[None, :]
    mask = (rows < T)[:, None] & (columns < E)[None, :]
    logits = tl.load(logits_ptr + offsets, mask=mask, other=0.0)
    return tl.where((columns < E)[None, :], logits, float("-inf"))


@jit
def forward_kernel(
    logits_ptr,
    bias_ptr,
    experts_ptr,
    weights_ptr,
    probability_ptr,
    choices_ptr,
    z_ptr,
    T,
    factor,
    E: tl.constexpr,
    K: tl.constexpr,
    IS_SIGMOID: tl.constexpr,
    NORMALISES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK_E)
    turns = tl.arange(0, BLOCK_K)
    probability_sum = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
    choices = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.int32)
    z_sum = tl.zeros([BLOCK_T], dtype=tl.float32)

    for tile in range(program, tl.cdiv(T, BLOCK_T), tl.num_programs(0)):
        rows = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        is_token = rows < T
        logits = _load_logits(logits_ptr, rows, columns, T, E)
        top = tl.max(logits, 1)
        powers = tl.exp(logits - top[:, None])
        total = tl.sum(powers, 1)
        logsumexp = top + tl.log(total)
        z_sum += tl.where(is_token, logsumexp * logsumexp, 0.0)
        ranks = logits
        if IS_SIGMOID:
            scores = tl.sigmoid(logits)
            probability = scores / (tl.sum(scores, 1) + 1e-20)[:, None]
            ranks = tl.where((columns < E)[None, :], scores, float("-inf"))
        else:
            scores = powers / total[:, None]
            probability = scores
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + columns, mask=columns < E, other=0.0).to(tl.float32)
            ranks = tl.where((columns < E)[None, :], scores + bias[None, :], float("-inf"))
        probability_sum += tl.where(is_token[:, None], probability, 0.0)

        weights = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.float32)
        experts = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.int32)
        for turn in range(K):
            _, best = tl.max(ranks, 1, return_indices=True)
            best = tl.minimum(best, E - 1)  # of a row of NaN, so that no index leads out of memory
            is_best = columns[None, :] == best[:, None]
            weight = tl.sum(tl.where(is_best, scores, 0.0), 1)
            is_turn = (turns == turn)[None, :]
            weights = tl.where(is_turn, weight[:, None], weights)
            experts = tl.where(is_turn, best[:, None], experts)
            ranks = tl.where(is_best, float("-inf"), ranks)
            choices += (is_best & is_token[:, None]).to(tl.int32)
        if NORMALISES:
            weights = weights / (tl.sum(weights, 1) + 1e-20)[:, None]
        offsets = rows[:, None] * K + turns[None, :]
        mask = is_token[:, None] & (turns < K)[None, :]
        tl.store(weights_ptr + offsets, weights * factor, mask=mask)
        tl.store(experts_ptr + offsets, experts, mask=mask)

    tl.store(probability_ptr + program * E + columns, tl.sum(probability_sum, 0), mask=columns < E)
    tl.store(choices_ptr + program * E + columns, tl.sum(choices, 0), mask=columns < E)
    tl.store(z_ptr + program, tl.sum(z_sum, 0))


@jit
def sum_kernel(
    probability_ptr,
    choices_ptr,
    z_ptr,
    probability_sum_ptr,
    choices_sum_ptr,
    z_sum_ptr,
    P,
    E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    probability = tl.zeros([BLOCK_P, BLOCK_E], dtype=tl.float32)
    choices = tl.zeros([BLOCK_P, BLOCK_E], dtype=tl.int32)
    z = tl.zeros([BLOCK_P], dtype=tl.float32)
    for first in range(0, P, BLOCK_P):
        programs = first + tl.arange(0, BLOCK_P)
        offsets = programs[:, None] * E + columns[None, :]
        mask = (programs < P)[:, None] & (columns < E)[None, :]
        probability += tl.load(probability_ptr + offsets, mask=mask, other=0.0)
        choices += tl.load(choices_ptr + offsets, mask=mask, other=0)
        z += tl.load(z_ptr + programs, mask=programs < P, other=0.0)
    tl.store(probability_sum_ptr + columns, tl.sum(probability, 0), mask=columns < E)
    tl.store(choices_sum_ptr + columns, tl.sum(choices, 0), mask=columns < E)
    if tl.program_id(0) == 0:
        tl.store(z_sum_ptr, tl.sum(z, 0))


@jit
def backward_kernel(
    logits_ptr,
    experts_ptr,
    d_weights_ptr,
    d_probability_ptr,
    d_z_ptr,
    d_logits_ptr,
    T,
    factor,
    E: tl.constexpr,
    K: tl.constexpr,
    IS_SIGMOID: tl.constexpr,
    NORMALISES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, BLOCK_E)
    logits = _load_logits(logits_ptr, rows, columns, T, E)
    top = tl.max(logits, 1)
    powers = tl.exp(logits - top[:, None])
    total = tl.sum(powers, 1)
    softmax = powers / total[:, None]
    scores = tl.sigmoid(logits) if IS_SIGMOID else softmax

    # d_scores is the gradient of the scores; d_logits what reaches the logits on no way through all the scores.
    d_scores = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
    d_logits = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
    if d_weights_ptr is not None:
        d_weights = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
        weights = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
        for turn in range(K):
            expert = tl.load(experts_ptr + rows * K + turn, mask=rows < T, other=0)
            d_weight = tl.load(d_weights_ptr + rows * K + turn, mask=rows < T, other=0.0) * factor
            is_expert = columns[None, :] == expert[:, None]
            d_weights = tl.where(is_expert, d_weight[:, None], d_weights)
            weights = tl.where(is_expert, scores, weights)
        if NORMALISES:
            divisor = (tl.sum(weights, 1) + 1e-20)[:, None]
            weights = weights / divisor
            mean = tl.sum(weights * d_weights, 1)[:, None]
            d_weights = d_weights - mean
            if IS_SIGMOID:
                d_scores += tl.where(weights > 0, d_weights / divisor, 0.0)
            else:
                # The weights sum up to one but for the 1e-20, which counts where a bias chose experts of no score.
                d_logits += weights * d_weights - softmax * (mean * (1e-20 / divisor))
        else:
            d_scores += d_weights
    if d_probability_ptr is not None:
        d_probability = tl.load(d_probability_ptr + columns, mask=columns < E, other=0.0)[None, :]
        if IS_SIGMOID:
            divisor = (tl.sum(scores, 1) + 1e-20)[:, None]
            d_scores += (d_probability - tl.sum(scores * d_probability, 1)[:, None] / divisor) / divisor
        else:
            d_scores += d_probability
    if d_z_ptr is not None:
        d_logits += 2 * tl.load(d_z_ptr) * (top + tl.log(total))[:, None] * softmax
    if IS_SIGMOID:
        d_logits += d_scores * scores * (1 - scores)
    else:
        d_logits += softmax * (d_scores - tl.sum(softmax * d_scores, 1)[:, None])
    mask = (rows < T)[:, None] & (columns < E)[None, :]
    tl.store(d_logits_ptr + rows.to(tl.int64)[:, None] * E + columns[None, :], d_logits, mask=mask)
