"""Where the rows of a mixture of experts stand: sorted by expert, with an end for each.

A stable counting sort on the device. Nothing is read on the host, and every size is known before: R rows, or
E x capacity where experts are padded. Rows of an expert stand in the order of their tokens, so the same choices give
the same order at every run.

With a capacity, an expert that was chosen more often drops choices as Megatron-Core's router does
(moe_expert_capacity_factor, moe_token_drop_policy): those of the lowest weight ("probs") or the latest tokens'
("position"). Megatron-Core pads with tokens that did not choose the expert, at weight zero; here a row of padding
belongs to no token. The layer's output is the same.
"""

# Shapes: T tokens, E experts, K top-k, R = T*K choices, P programs that count, each a run of choices in a row.

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ckptbridge.kernels.arguments import check_shape
from ckptbridge.kernels.backend import Backend, jit, require_backend, tl

DropPolicy = Literal["probs", "position"]
MAX_EXPERTS = 1024


@dataclass(frozen=True, slots=True)
class Order:
    """Expert e's rows are [ends_E[e - 1], ends_E[e]); rows from ends_E[-1] on are garbage that no result may read.

    Row indices and counts stay on the device: no operation waits for them.
    """

    tokens_R: Tensor
    """int32: the token that each sorted row is a copy of; -1 for a row of padding, which is all zeros."""
    rows_TK: Tensor
    """int32: where each choice stands among the sorted rows; -1 when it was dropped."""
    ends_E: Tensor
    """int32: the row behind each expert's last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderConfig:
    """Launch knobs. Every program takes a run of tiles of `block_choices` choices, in whole tiles."""

    # Ranks within a tile come from comparing each choice with each: 16 KiB of bits at 128.
    block_choices: int = 128
    # Every program that places reads the counts of all: 64 KiB with 128 programs and 128 experts.
    max_programs: int = 128
    counts_at_once: int = 4096
    num_warps: int = 4


def expert_capacity(tokens: int, topk: int, num_experts: int, factor: float) -> int:
    """How many rows an expert may have: `factor` times its even share, but no more than there are tokens.

    Megatron-Core's number; where that is more than `tokens`, nothing is dropped either way.
    """
    rows = tokens * topk / num_experts * factor
    return tokens if rows >= tokens else math.ceil(rows)  # infinity, of a huge factor, has no ceiling


def order_by_expert(
    experts_TK: Tensor,
    num_experts: int,
    *,
    capacity: int | None = None,
    drop_policy: DropPolicy = "probs",
    pad_to_capacity: bool = False,
    weights_TK: Tensor | None = None,
    backend: Backend = "reference",
    config: OrderConfig | None = None,
) -> Order:
    """Sort the choices [T, K] of experts (int32 or int64, 0 to num_experts - 1), tokens in their order.

    `capacity` is the most rows an expert may have; None drops nothing. The drop policy "probs" keeps the choices of
    the largest `weights_TK` (fp32; of equal ones the earlier token's), "position" those of the earliest tokens.
    With `pad_to_capacity` every expert has exactly `capacity` rows, the last of them padding if it needs any. The
    buffers have T*K rows, padded num_experts * capacity. `config` overrides the launch knobs of the triton backend;
    the order does not depend on them. Raises ValueError for arguments that do not fit and BackendError when `backend`
    cannot run on the device.
    """
    _check(experts_TK, num_experts, capacity, drop_policy, pad_to_capacity, weights_TK)
    require_backend(backend, experts_TK.device)
    weights_TK = weights_TK.detach() if weights_TK is not None and drop_policy == "probs" else None
    rows = num_experts * capacity if capacity is not None and pad_to_capacity else experts_TK.numel()
    if backend == "triton" and experts_TK.numel() > 0 and capacity != 0:
        weights_TK = None if weights_TK is None else weights_TK.contiguous()
        knobs = config or OrderConfig()
        return _order_triton(experts_TK.contiguous(), num_experts, rows, capacity, pad_to_capacity, weights_TK, knobs)
    return _order_reference(experts_TK, num_experts, rows, capacity, pad_to_capacity, weights_TK)


def _check(
    experts_TK: Tensor,
    num_experts: int,
    capacity: int | None,
    drop_policy: str,
    pad_to_capacity: bool,
    weights_TK: Tensor | None,
) -> None:
    name = "order_by_expert"
    if experts_TK.ndim != 2 or experts_TK.dtype not in (torch.int32, torch.int64):
        found = f"{tuple(experts_TK.shape)} of {experts_TK.dtype}"
        raise ValueError(f"{name}: experts_TK: expected two dimensions of torch.int32 or torch.int64, found {found}")
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"{name}: num_experts: expected 1 to {MAX_EXPERTS}, found {num_experts}")
    if drop_policy not in ("probs", "position"):
        raise ValueError(f"{name}: drop_policy: expected probs or position, found {drop_policy!r}")
    if capacity is None:
        if pad_to_capacity:
            raise ValueError(f"{name}: pad_to_capacity: expected a capacity to pad to, found None")
        return
    if capacity < 0:
        raise ValueError(f"{name}: capacity: expected at least 0, found {capacity}")
    if drop_policy == "probs":
        if weights_TK is None:
            raise ValueError(f"{name}: weights_TK: expected the weights that drop_policy probs compares, found None")
        check_shape(name, "weights_TK", weights_TK, tuple(experts_TK.shape), "that of experts_TK")
        if weights_TK.dtype != torch.float32:
            raise ValueError(f"{name}: weights_TK: expected dtype torch.float32, found {weights_TK.dtype}")


def _order_reference(
    experts_TK: Tensor, num_experts: int, rows: int, capacity: int | None, padded: bool, weights_TK: Tensor | None
) -> Order:
    """The definition, by sorts and running sums; it reads nothing on the host either."""
    experts_R, device = experts_TK.flatten(), experts_TK.device
    R, topk = experts_R.numel(), max(1, experts_TK.shape[1])
    all_E, all_R = torch.arange(num_experts, device=device), torch.arange(R, device=device)
    sorted_R, choice_R = experts_R.long().sort(stable=True)
    counts_E = torch.searchsorted(sorted_R, all_E, right=True).diff(prepend=all_E.new_zeros(1))
    rank_R = _ranks(choice_R, sorted_R, counts_E)
    is_kept_R = torch.ones_like(experts_R, dtype=torch.bool)
    if capacity is not None:
        place_R = rank_R
        if weights_TK is not None:
            falling_R = weights_TK.flatten().argsort(descending=True, stable=True)
            place_R = _ranks(falling_R[experts_R[falling_R].argsort(stable=True)], sorted_R, counts_E)
        is_kept_R = place_R < capacity
        counts_E = counts_E.clamp(max=capacity)
        kept_before_R = is_kept_R[choice_R].long().cumsum(0) - is_kept_R[choice_R].long()
        starts_E = counts_E.cumsum(0) - counts_E
        rank_R = torch.empty_like(rank_R).scatter_(0, choice_R, kept_before_R - starts_E[sorted_R])
    widths_E = torch.full_like(counts_E, capacity) if capacity is not None and padded else counts_E
    ends_E = widths_E.cumsum(0)
    rows_R = (ends_E - widths_E)[experts_R] + rank_R
    # What was dropped is written behind the last row, and cut off.
    tokens_R = torch.full((rows + 1,), -1, dtype=torch.int32, device=device)
    tokens_R.scatter_(0, torch.where(is_kept_R, rows_R, rows), (all_R // topk).int())
    rows_TK = torch.where(is_kept_R, rows_R, -1).int().view_as(experts_TK)
    return Order(tokens_R[:rows], rows_TK, ends_E.int())


def _ranks(choice_R: Tensor, sorted_R: Tensor, counts_E: Tensor) -> Tensor:
    """The place of each choice within its expert, of choices that are listed by expert."""
    starts_E = counts_E.cumsum(0) - counts_E
    places_R = torch.arange(len(choice_R), device=choice_R.device) - starts_E[sorted_R]
    return torch.empty_like(places_R).scatter_(0, choice_R, places_R)


def _order_triton(
    experts_TK: Tensor,
    num_experts: int,
    rows: int,
    capacity: int | None,
    padded: bool,
    weights_TK: Tensor | None,
    config: OrderConfig,
) -> Order:
    device, R, topk = experts_TK.device, experts_TK.numel(), experts_TK.shape[1]
    block_experts = max(16, 1 << (num_experts - 1).bit_length())
    tiles = -(-R // config.block_choices)
    tiles_a_program = -(-tiles // config.max_programs)
    P = -(-tiles // tiles_a_program)
    limit = -1 if capacity is None else capacity
    by_weight = capacity is not None and weights_TK is not None
    counts_PE = torch.empty(P, block_experts, dtype=torch.int32, device=device)
    rows_TK = torch.empty(experts_TK.shape, dtype=torch.int32, device=device)
    ends_E = torch.empty(num_experts, dtype=torch.int32, device=device)
    if capacity is None:
        tokens_R = torch.empty(rows, dtype=torch.int32, device=device)
    else:
        tokens_R = torch.full((rows,), -1, dtype=torch.int32, device=device)
    # By weight, choices are sorted whole at first; an expert's program then keeps the best of its own.
    placed_R = torch.empty(R, dtype=torch.int32, device=device) if by_weight else tokens_R
    tile = {"BLOCK": config.block_choices, "BLOCK_E": block_experts, "num_warps": config.num_warps}
    shape = {"R": R, "TILES": tiles_a_program, **tile}
    _count_kernel[(P,)](experts_TK, counts_PE, **shape)
    _place_kernel[(P,)](
        experts_TK,
        counts_PE,
        placed_R,
        rows_TK,
        ends_E,
        P,
        -1 if by_weight else limit,
        E=num_experts,
        DIVISOR=1 if by_weight else topk,
        DROPS=capacity is not None and not by_weight,
        PADDED=padded and not by_weight,
        BLOCK_P=max(1, config.counts_at_once // block_experts),
        **shape,
    )
    if by_weight:
        kept_ends_E = torch.empty_like(ends_E)
        _keep_kernel[(num_experts,)](
            weights_TK,
            placed_R,
            ends_E,
            tokens_R,
            rows_TK,
            kept_ends_E,
            limit,
            E=num_experts,
            K=topk,
            PADDED=padded,
            BLOCK=1024,
            BLOCK_E=block_experts,
            num_warps=4,
        )
        ends_E = kept_ends_E
    return Order(tokens_R, rows_TK, ends_E)


@jit
def _count_kernel(experts_ptr, counts_ptr, R, TILES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """How often the choices of each program fell on each expert."""
    program = tl.program_id(0)
    counts_E = tl.zeros([BLOCK_E], dtype=tl.int32)
    for tile in range(TILES):
        rows = (program * TILES + tile) * BLOCK + tl.arange(0, BLOCK)
        experts = tl.load(experts_ptr + rows, mask=rows < R, other=0).to(tl.int32)
        counts_E += tl.histogram(experts, BLOCK_E, mask=rows < R)
    tl.store(counts_ptr + program * BLOCK_E + tl.arange(0, BLOCK_E), counts_E)


@jit
def _place_kernel(
    experts_ptr,
    counts_ptr,
    tokens_ptr,
    rows_ptr,
    ends_ptr,
    P,
    capacity,
    R,
    E: tl.constexpr,
    DIVISOR: tl.constexpr,
    DROPS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Every program sums the counts by itself, which saves a launch, and places its own choices."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK_E)
    counts_E = tl.zeros([BLOCK_E], dtype=tl.int32)
    before_E = tl.zeros([BLOCK_E], dtype=tl.int32)
    for first in range(0, P, BLOCK_P):
        programs = first + tl.arange(0, BLOCK_P)
        offsets = programs[:, None] * BLOCK_E + columns[None, :]
        counts_PE = tl.load(counts_ptr + offsets, mask=(programs < P)[:, None], other=0)
        counts_E += tl.sum(counts_PE, 0)
        before_E += tl.sum(tl.where((programs < program)[:, None], counts_PE, 0), 0)
    if DROPS:
        counts_E = tl.minimum(counts_E, capacity)
    if PADDED:
        counts_E = tl.zeros([BLOCK_E], dtype=tl.int32) + capacity
    ends_E = tl.cumsum(counts_E, 0)
    starts_E = ends_E - counts_E
    if program == 0:
        tl.store(ends_ptr + columns, ends_E, mask=columns < E)

    places = tl.arange(0, BLOCK)
    for tile in range(TILES):
        choices = (program * TILES + tile) * BLOCK + places
        is_choice = choices < R
        experts = tl.load(experts_ptr + choices, mask=is_choice, other=0).to(tl.int32)
        is_earlier = (experts[:, None] == experts[None, :]) & (places[None, :] < places[:, None])
        rank = tl.sum(is_earlier.to(tl.int32), 1) + tl.gather(before_E, experts, 0)
        rows = tl.gather(starts_E, experts, 0) + rank
        is_kept = is_choice
        if DROPS:
            is_kept = is_choice & (rank < capacity)
            rows = tl.where(is_kept, rows, -1)
        tl.store(rows_ptr + choices, rows, mask=is_choice)
        tl.store(tokens_ptr + rows, choices // DIVISOR, mask=is_kept)
        before_E += tl.histogram(experts, BLOCK_E, mask=is_choice)


@jit
def _keep_kernel(
    weights_ptr,
    choices_ptr,
    all_ends_ptr,
    tokens_ptr,
    rows_ptr,
    ends_ptr,
    capacity,
    E: tl.constexpr,
    K: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One expert's choices: find the lowest weight that is kept, a byte of it at a time, then place the kept ones."""
    expert = tl.program_id(0)
    columns = tl.arange(0, BLOCK_E)
    all_ends_E = tl.load(all_ends_ptr + columns, mask=columns < E, other=0)
    all_starts_E = tl.load(all_ends_ptr + columns - 1, mask=(columns < E) & (columns > 0), other=0)
    first = tl.sum(tl.where(columns == expert, all_starts_E, 0), 0)
    end = tl.sum(tl.where(columns == expert, all_ends_E, 0), 0)
    kept_E = tl.minimum(all_ends_E - all_starts_E, capacity)
    if PADDED:
        kept_E = tl.zeros([BLOCK_E], dtype=tl.int32) + capacity
    row = tl.sum(tl.where(columns < expert, kept_E, 0), 0)
    width = tl.sum(tl.where(columns == expert, kept_E, 0), 0)
    tl.store(ends_ptr + expert, row + width)

    # Bits of a float as an unsigned number that rises with it. `lowest` gathers the lowest kept one from the top;
    # `left` is how many of those that share its bits so far are kept.
    digits = tl.arange(0, 256)
    lowest = tl.zeros([], dtype=tl.uint32)
    left = tl.zeros([], dtype=tl.int32) + capacity  # Triton takes a capacity of 1 for a constant, which `left` is not
    if end - first > capacity:
        for byte in tl.static_range(4):
            shift = 24 - 8 * byte
            counts = tl.zeros([256], dtype=tl.int32)
            for start in range(first, end, BLOCK):
                places = start + tl.arange(0, BLOCK)
                keys = _keys(weights_ptr, choices_ptr, places, places < end)
                is_near = places < end
                if byte > 0:
                    is_near = is_near & ((keys >> (shift + 8)) == (lowest >> (shift + 8)))
                counts += tl.histogram(((keys >> shift) & 255).to(tl.int32), 256, mask=is_near)
            above = tl.sum(counts, 0) - tl.cumsum(counts, 0)
            is_digit = (above < left) & (above + counts >= left)
            lowest = lowest | (tl.sum(tl.where(is_digit, digits, 0), 0).to(tl.uint32) << shift)
            left -= tl.sum(tl.where(is_digit, above, 0), 0)
    else:
        left = end - first  # more than any weight can tie: all are kept

    ties = 0
    for start in range(first, end, BLOCK):
        places = start + tl.arange(0, BLOCK)
        is_choice = places < end
        keys = _keys(weights_ptr, choices_ptr, places, is_choice)
        is_tie = ((keys == lowest) & is_choice).to(tl.int32)
        is_kept = is_choice & ((keys > lowest) | ((is_tie > 0) & (ties + tl.cumsum(is_tie, 0) <= left)))
        kept = is_kept.to(tl.int32)
        rows = tl.where(is_kept, row + tl.cumsum(kept, 0) - kept, -1)
        choices = tl.load(choices_ptr + places, mask=is_choice, other=0)
        tl.store(rows_ptr + choices, rows, mask=is_choice)
        tl.store(tokens_ptr + rows, choices // K, mask=is_kept)
        ties += tl.sum(is_tie, 0)
        row += tl.sum(kept, 0)


@jit
def _keys(weights_ptr, choices_ptr, places, mask):
    choices = tl.load(choices_ptr + places, mask=mask, other=0)
    bits = tl.load(weights_ptr + choices, mask=mask, other=0.0).to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) > 0, ~bits, bits | 0x80000000)
