"""Rows of a matrix by token id, whose gradient is summed without atomics: the same bits at every run.

Tokens are sorted, equal ones stay in their order, and one program sums the rows of one word in fp32, from the first to
the last. The sum goes into the weight's main gradient where it has one, else it is rounded once.

Memory-bound. Floor of the backward pass: read T rows, write (with a main gradient that holds something: read and
write) a row for each word that the text has; where the gradient is new, write zeros once everywhere.
"""

# Shapes: T tokens, V vocab_size, H hidden_size.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ckptbridge.kernels.arguments import check_tensor
from ckptbridge.kernels.backend import Backend, jit, require_backend, tl
from ckptbridge.kernels.main_gradient import main_gradient_of


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingConfig:
    """Launch knobs of the backward pass. A program sums `block_tokens` rows at a time, `block_width` columns of them.

    Most words of a text stand in it once or twice, a few in a twentieth of all places: eight rows at a time leave
    little idle for the first and are many loads under way for the others.
    """

    block_tokens: int
    block_width: int
    num_warps: int = 4

    @classmethod
    def from_shape(cls, hidden_size: int) -> EmbeddingConfig:
        """Knobs for rows of `hidden_size` elements."""
        return cls(block_tokens=8, block_width=min(512, 1 << (hidden_size - 1).bit_length()))


def embedding(
    tokens: Tensor, weight_VH: Tensor, *, backend: Backend = "reference", config: EmbeddingConfig | None = None
) -> Tensor:
    """Rows of weight_VH (fp32 or bf16) by tokens [...] (int64, each below V): [..., H].

    With the triton backend the weight's gradient is added to its main gradient where it has one. The others leave it
    to torch, whose own kernel adds with atomics on a GPU; but on a CPU in bf16, where torch rounds at every token, it
    is summed in fp32 as well. `config` overrides the launch knobs. Raises ValueError for arguments that do not fit and
    BackendError when `backend` cannot run on the device of the weight.
    """
    check_tensor("embedding", "weight_VH", weight_VH)
    if weight_VH.ndim != 2:
        raise ValueError(f"embedding: weight_VH: expected [V, H], found shape {tuple(weight_VH.shape)}")
    if tokens.dtype != torch.int64 or tokens.device != weight_VH.device:
        raise ValueError(
            f"embedding: tokens: expected torch.int64 on {weight_VH.device}, found {tokens.dtype} on {tokens.device}"
        )
    require_backend(backend, weight_VH.device)
    if backend != "triton":
        is_rounded = weight_VH.dtype == torch.bfloat16 and not weight_VH.is_cuda
        return _Embedding.apply(tokens, weight_VH, None) if is_rounded else F.embedding(tokens, weight_VH)
    return _Embedding.apply(tokens, weight_VH, config or EmbeddingConfig.from_shape(weight_VH.shape[1]))


class _Embedding(torch.autograd.Function):
    """With a config the kernel sums. Keeps the tokens."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight_VH: Tensor, config: EmbeddingConfig | None) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.shape, ctx.dtype, ctx.config = weight_VH.shape, weight_VH.dtype, config
        ctx.main_gradient = main_gradient_of(weight_VH)
        return F.embedding(tokens, weight_VH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[None, Tensor | None, None]:
        (tokens,) = ctx.saved_tensors
        if ctx.config is None:
            return None, _summed_by_torch(ctx, tokens.flatten(), d_out.flatten(0, -2)), None
        d_weight, accumulate = None, False
        if ctx.main_gradient is not None:
            target, accumulate = ctx.main_gradient.target()
            if not accumulate:
                target.zero_()
        else:
            d_weight = target = torch.zeros(ctx.shape, dtype=ctx.dtype, device=d_out.device)
        T, H, config = tokens.numel(), ctx.shape[1], ctx.config
        if T > 0:
            sorted_T, places_T = tokens.flatten().sort(stable=True)
            ends_T = torch.searchsorted(sorted_T, sorted_T, right=True)
            _backward_kernel[(T, -(-H // config.block_width))](
                d_out.contiguous(),
                sorted_T,
                places_T,
                ends_T,
                target,
                H=H,
                ACCUMULATE=accumulate,
                BLOCK_T=config.block_tokens,
                BLOCK_H=config.block_width,
                num_warps=config.num_warps,
            )
        return None, d_weight, None


def _summed_by_torch(ctx: Any, tokens_T: Tensor, d_TH: Tensor) -> Tensor | None:
    """The gradient in fp32, into the main gradient where there is one, else rounded once."""
    sums_VH = torch.zeros(ctx.shape, dtype=torch.float32, device=d_TH.device).index_add_(0, tokens_T, d_TH.float())
    if ctx.main_gradient is None:
        return sums_VH.to(ctx.dtype)
    ctx.main_gradient.add(sums_VH)
    return None


@jit
def _backward_kernel(
    d_out_ptr,
    sorted_ptr,
    places_ptr,
    ends_ptr,
    target_ptr,
    H: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    first = tl.program_id(0)
    word = tl.load(sorted_ptr + first)
    before = tl.load(sorted_ptr + first - 1, mask=first > 0, other=-1)
    if word != before:  # one program of all that stand at a word sums its rows
        end = tl.load(ends_ptr + first).to(tl.int32)
        columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        target = target_ptr + word * H + columns
        total = tl.zeros([BLOCK_H], dtype=tl.float32)
        for start in tl.range(first, end, BLOCK_T):
            ranks = start + tl.arange(0, BLOCK_T)
            places = tl.load(places_ptr + ranks, mask=ranks < end, other=0)
            mask = (ranks < end)[:, None] & (columns < H)[None, :]
            rows = tl.load(d_out_ptr + places[:, None] * H + columns[None, :], mask=mask, other=0.0)
            total += tl.sum(rows.to(tl.float32), 0)
        if ACCUMULATE:
            total += tl.load(target, mask=columns < H, other=0.0)
        tl.store(target, total.to(target_ptr.dtype.element_ty), mask=columns < H)
