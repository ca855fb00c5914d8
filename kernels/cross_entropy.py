"""Next-token loss straight from hidden states: `-log softmax(hidden @ weight.T)[target]`, the logits a few at a time.

Tokens are taken in chunks. A chunk's logits are one matrix product, rounded to the dtype of the hidden states; the
softmax is taken in fp32. When gradients are wanted the loss's gradient takes the logits' place at once, and the two
products that it goes into follow, so that no logits are kept or computed a second time.

What is not a matrix product is memory-bound. Floor, in passes of T x V over HBM: 2 with gradients (read the logits,
write their gradient over them), 1 without. A row is read twice, the second time from the cache: the rows that a
Hopper GPU works on at once (of 128,256 words 132, one a multiprocessor, of 256 KB each) take 34 of its 50 MB.
"""

# Shapes: T tokens, C tokens of a chunk, H hidden_size, V vocab_size.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ckptbridge.kernels.arguments import check_shape, check_tensor
from ckptbridge.kernels.backend import Backend, compiled, jit, require_backend, tl
from ckptbridge.kernels.main_gradient import MainGradient, main_gradient_of

CHUNK_TOKENS = 256
"""On a CPU. At SmolLM2's 49,152 words a chunk of fp32 logits is 50 MB; at Qwen's 151,936 it is 156 MB."""
CHUNK_NBYTES = 512 << 20
"""Of a chunk's logits on a GPU, about. Each chunk reads and writes the fp32 gradient of the weight once, 8 bytes for
every 2 C FLOPs: at C = 2048 (128,256 words) that traffic takes 0.3 of the product's own time on an H200, at half
the bytes 0.6."""
_ROW_ALIGNMENT = 64  # elements: every row of logits starts on a 128-byte line, whatever the vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEntropyConfig:
    """Launch knobs. A program works on one row of logits, `block_width` of them at a time."""

    block_width: int
    num_warps: int

    @classmethod
    def from_shape(cls, vocab_size: int) -> CrossEntropyConfig:
        """Knobs for rows of `vocab_size` logits."""
        # 16 elements a thread: two 16-byte loads of bf16 under way, and 64 registers, so that 32 warps fill a
        # multiprocessor. How many rows they share out is chosen by what the cache holds, some 40 MB of rows: of
        # 32,768 words four on each of 132 multiprocessors take 35 MB, of 128,256 one takes 34 MB.
        widest = 4096 if vocab_size <= 37_000 else 8192 if vocab_size <= 75_000 else 16384
        block_width = min(widest, 1 << (vocab_size - 1).bit_length())
        return cls(block_width=block_width, num_warps=max(1, block_width // 512))


def linear_cross_entropy_reference(hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, divisor: float) -> Tensor:
    """The definition, with all logits at once; autograd differentiates it. Also takes fp64."""
    logits_TV = hidden_TH @ weight_VH.t()
    wide = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(wide, targets_T, reduction="sum") / divisor


def linear_cross_entropy(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    divisor: float = 1.0,
    *,
    starts_backward: bool = False,
    backend: Backend = "reference",
    chunk_tokens: int | None = None,
    config: CrossEntropyConfig | None = None,
) -> Tensor:
    """The sum over tokens of -log softmax(hidden @ weight.T)[target], in nats, over `divisor`: an fp32 scalar.

    hidden_TH and weight_VH: fp32 or bf16, of one dtype. targets_T: int64, each below V. `starts_backward` is the
    caller's promise that the gradient of this result will be exactly 1, because it is a term of the very loss that
    `.backward()` is called on, once. Then gradients are final when they are computed, in the forward pass, and the
    weight's is added to its main gradient there. Without the promise they are multiplied by the gradient that comes,
    and the main gradient is touched in the backward pass only, at the price of an fp32 copy and a pass. A promise
    that is broken is an error: ValueError on a CPU, a failed device assertion on a GPU, which nobody waits for.

    `chunk_tokens` and `config` override the chunk and the launch knobs. Raises ValueError for arguments that do not
    fit and BackendError when `backend` cannot run on the device of hidden_TH.
    """
    check_tensor("linear_cross_entropy", "hidden_TH", hidden_TH)
    check_tensor("linear_cross_entropy", "weight_VH", weight_VH, like=hidden_TH)
    T, H = hidden_TH.shape if hidden_TH.ndim == 2 else (-1, -1)
    if hidden_TH.ndim != 2:
        raise ValueError(f"linear_cross_entropy: hidden_TH: expected [T, H], found shape {tuple(hidden_TH.shape)}")
    check_shape("linear_cross_entropy", "weight_VH", weight_VH, (weight_VH.shape[0], H), "[V, width of hidden_TH]")
    check_shape("linear_cross_entropy", "targets_T", targets_T, (T,), "one for each row of hidden_TH")
    if weight_VH.dtype != hidden_TH.dtype:
        raise ValueError(
            f"linear_cross_entropy: weight_VH: expected dtype {hidden_TH.dtype} of hidden_TH, found {weight_VH.dtype}"
        )
    if targets_T.dtype != torch.int64 or targets_T.device != hidden_TH.device:
        raise ValueError(
            f"linear_cross_entropy: targets_T: expected torch.int64 on {hidden_TH.device}, "
            f"found {targets_T.dtype} on {targets_T.device}"
        )
    require_backend(backend, hidden_TH.device)
    if not torch.is_grad_enabled():  # ctx.needs_input_grad does not know
        hidden_TH, weight_VH = hidden_TH.detach(), weight_VH.detach()
    chunk_tokens = chunk_tokens or _chunk_tokens(T, weight_VH)
    config = config or CrossEntropyConfig.from_shape(weight_VH.shape[0])
    return _LinearCrossEntropy.apply(
        hidden_TH, weight_VH, targets_T.contiguous(), float(divisor), starts_backward, backend, chunk_tokens, config
    )


def _chunk_tokens(T: int, weight_VH: Tensor) -> int:
    if not weight_VH.is_cuda:
        return CHUNK_TOKENS
    at_once = max(1, CHUNK_NBYTES // (weight_VH.shape[0] * weight_VH.element_size()))
    chunks = max(1, -(-T // at_once))
    return 128 * -(-T // (128 * chunks)) or 1  # chunks of one size, in whole tiles of a matrix product


class _LinearCrossEntropy(torch.autograd.Function):
    """Keeps the gradients and nothing else."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        targets_T: Tensor,
        divisor: float,
        starts_backward: bool,
        backend: Backend,
        chunk_tokens: int,
        config: CrossEntropyConfig,
    ) -> Tensor:
        wants_hidden, wants_weight, *_ = ctx.needs_input_grad
        ctx.main_gradient = main_gradient_of(weight_VH) if wants_weight else None
        ctx.starts_backward, ctx.weight_dtype = starts_backward, weight_VH.dtype
        d_hidden_TH = torch.empty_like(hidden_TH) if wants_hidden else None
        ctx.d_hidden_TH, ctx.own = d_hidden_TH, None
        sums_VH = ctx.main_gradient if starts_backward else None
        if wants_weight and sums_VH is None:
            sums_VH = ctx.own = MainGradient(torch.empty_like(weight_VH, dtype=torch.float32))

        T, V = len(hidden_TH), len(weight_VH)
        # On a CPU torch's bf16 product reads what lies between the rows, and a NaN there spreads: no gaps.
        row = -(-V // _ROW_ALIGNMENT) * _ROW_ALIGNMENT if hidden_TH.is_cuda else V
        rows_C = hidden_TH.new_empty(min(chunk_tokens, T), row)
        rows_C[:, V:] = 0  # torch 2.13's bf16 product on a CPU reads what lies between two rows; NaN there is NaN here
        logits_CV = rows_C[:, :V]
        wants_gradients = wants_hidden or wants_weight
        loss = hidden_TH.new_zeros((), dtype=torch.float32)
        for start in range(0, T, chunk_tokens):
            hidden_CH, targets_C = hidden_TH[start : start + chunk_tokens], targets_T[start : start + chunk_tokens]
            logits = torch.mm(hidden_CH, weight_VH.t(), out=logits_CV[: len(hidden_CH)])
            losses_C = token_losses(logits, targets_C, divisor if wants_gradients else None, backend, config)
            loss += losses_C.sum()
            if d_hidden_TH is not None:
                torch.mm(logits, weight_VH, out=d_hidden_TH[start : start + chunk_tokens])
            if sums_VH is not None:
                sums_VH.add_product(logits.t(), hidden_CH)
        return loss / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden_TH, own = ctx.d_hidden_TH, ctx.own
        del ctx.d_hidden_TH, ctx.own  # they may be changed here, and are needed once
        d_weight_VH = None if own is None else own.finish()
        if ctx.starts_backward:
            _assert_one(gradient)
        # On a GPU reading the factor would wait for it; on a CPU it saves a pass over the largest gradient.
        elif gradient.is_cuda or gradient.item() != 1.0:
            d_hidden_TH, d_weight_VH = (d if d is None else d.mul_(gradient) for d in (d_hidden_TH, d_weight_VH))
        if d_weight_VH is not None and ctx.main_gradient is not None:
            ctx.main_gradient.add(d_weight_VH)
            d_weight_VH = None
        return d_hidden_TH, None if d_weight_VH is None else d_weight_VH.to(ctx.weight_dtype), *([None] * 6)


def _assert_one(gradient: Tensor) -> None:
    message = (
        "linear_cross_entropy: expected the gradient 1 that starts_backward promised; "
        "scale the loss by `divisor`, or do not promise"
    )
    if gradient.is_cuda:
        torch._assert_async(gradient == 1, message)
    elif gradient.item() != 1.0:
        raise ValueError(f"{message}; found {gradient.item()}")


def token_losses(
    logits_CV: Tensor, targets_C: Tensor, divisor: float | None, backend: Backend, config: CrossEntropyConfig
) -> Tensor:
    """The loss of each token, fp32 [C]. With a divisor the logits become the gradient of their sum over it."""
    if backend != "triton":
        reference = compiled(token_losses_reference) if backend == "torch" else token_losses_reference
        losses_C, d_logits_CV = reference(logits_CV, targets_C, divisor)
        if d_logits_CV is not None:
            logits_CV.copy_(d_logits_CV)
        return losses_C
    C, V = logits_CV.shape
    losses_C = torch.empty(C, dtype=torch.float32, device=logits_CV.device)
    if C > 0:
        _kernel[(C,)](
            logits_CV,
            targets_C,
            losses_C,
            1.0 if divisor is None else divisor,
            logits_CV.stride(0),
            V,
            WANTS_GRADIENT=divisor is not None,
            BLOCK_V=config.block_width,
            num_warps=config.num_warps,
        )
    return losses_C


def token_losses_reference(logits_CV: Tensor, targets_C: Tensor, divisor: float | None) -> tuple[Tensor, Tensor | None]:
    """What the kernel computes of a chunk: losses [C], and the gradient [C, V] of their sum over `divisor`."""
    targets_C1 = targets_C.unsqueeze(1)
    log_probabilities = logits_CV.log_softmax(1, dtype=torch.promote_types(logits_CV.dtype, torch.float32))
    losses_C = -log_probabilities.gather(1, targets_C1).squeeze(1)
    if divisor is None:
        return losses_C, None
    probabilities = log_probabilities.exp_()
    probabilities.scatter_add_(1, targets_C1, probabilities.new_full(targets_C1.shape, -1.0))
    return losses_C, probabilities.div_(divisor).to(logits_CV.dtype)


@jit
def _kernel(
    logits_ptr,
    targets_ptr,
    losses_ptr,
    divisor,
    row_stride,
    V,
    WANTS_GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    words = tl.arange(0, BLOCK_V)
    target = tl.load(targets_ptr + row)
    # A target that is no word makes the loss NaN. Read here: the gradient will be written over it.
    is_word = (target >= 0) & (target < V)
    of_target = tl.load(logits_ptr + target, mask=is_word, other=float("nan")).to(tl.float32)

    # Each lane has its own largest logit and sum: lanes meet once a row, not once a block.
    largest = tl.full([BLOCK_V], -3.0e38, dtype=tl.float32)  # finite: what is beyond V must not become inf - inf
    total = tl.zeros([BLOCK_V], dtype=tl.float32)
    for start in tl.range(0, V, BLOCK_V):
        is_in = start + words < V
        logits = tl.load(logits_ptr + start + words, mask=is_in, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, logits)
        total = total * tl.exp(largest - larger) + tl.exp(logits - larger)
        largest = larger
    largest_of_all = tl.max(largest, 0)
    log_total = largest_of_all + tl.log(tl.sum(total * tl.exp(largest - largest_of_all), 0))
    tl.store(losses_ptr + row, log_total - of_target)

    if WANTS_GRADIENT:
        for start in tl.range(0, V, BLOCK_V):
            is_in = start + words < V
            logits = tl.load(logits_ptr + start + words, mask=is_in, other=float("-inf")).to(tl.float32)
            probabilities = tl.exp(logits - log_total)
            d_logits = tl.where(start + words == target, probabilities - 1.0, probabilities) / divisor
            tl.store(logits_ptr + start + words, d_logits.to(logits_ptr.dtype.element_ty), mask=is_in)
