"""Speed of a layer's other operations on one GPU, beside their floors: cross entropy, q/k/v, embedding, attention.

    PYTHONPATH=. python benchmarks/layer_kernels.py --out benchmarks/results      check, time, write layer_kernels.md
    PYTHONPATH=. python benchmarks/layer_kernels.py --out FOLDER --tune           also other launch knobs and chunks
    TRITON_INTERPRET=1 PYTHONPATH=. python benchmarks/layer_kernels.py --plumbing     small cases on a CPU, no times

Times are medians of replays of a CUDA graph, forward and backward passes together where both are named. The floor is
the least traffic over the bandwidth of a large copy or, of what is matrix products, their FLOPs over the rate of one
large product; both are measured in the same run. Everything is checked against fp64 on its case before it is timed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from kernel_run import Machine, run, time_us
from torch import Tensor

from ckptbridge.kernels.cross_entropy import CrossEntropyConfig, linear_cross_entropy, token_losses
from ckptbridge.kernels.embedding import EmbeddingConfig, embedding
from ckptbridge.kernels.main_gradient import MainGradient, set_main_gradient
from ckptbridge.kernels.rope import SplitQkvConfig, split_qkv
from ckptbridge.trainer.attention_kernels import choose_attention
from tests.kernels.cases_cross_entropy import REAL_TOKEN_LOSSES, SMALL_TOKEN_LOSSES, TokenLossCase
from tests.kernels.cases_embedding import REAL_EMBEDDING, SMALL_EMBEDDING, EmbeddingCase
from tests.kernels.cases_rope import REAL_SPLIT_QKV, SMALL_SPLIT_QKV, SplitQkvCase
from tests.kernels.oracle_cross_entropy import check_token_losses, token_loss_inputs
from tests.kernels.oracle_rope import check_split_qkv, split_qkv_inputs
from tests.kernels.test_embedding import check_embedding, embedding_inputs

HEADS = [(16384, 4096, 32768), (16384, 6144, 32768), (16384, 2048, 151936), (16384, 4096, 128256)]
"""Tokens, hidden_size and words of a step's cross entropy."""
ATTENTION = [(2, 8192, 32, 8, 128), (4, 4096, 48, 8, 128), (4, 4096, 28, 4, 128), (4, 4096, 32, 4, 128)]
"""Sequences, their length, heads, query groups, head dim."""
MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table; times in microseconds. `note` holds TFLOP/s or knobs."""

    operation: str
    case: str
    what: str
    floor: float
    time: float
    note: str = ""

    def __str__(self) -> str:
        share = f"{self.floor / self.time:.0%}" if self.time else "-"
        numbers = f"{self.floor:.1f} | {self.time:.1f} | {share}"
        return f"| {self.operation} | {self.case} | {self.what} | {numbers} | {self.note} |"


def time_token_losses(case: TokenLossCase, machine: Machine, *, tune: bool) -> Iterator[Row]:
    """The kernel over one chunk of logits. In every replay but the first the logits are gradients, of the same size."""
    knobs = CrossEntropyConfig.from_shape(case.V)
    variants = [knobs]
    if tune:
        shapes = [(2048, 4), (4096, 4), (4096, 8), (8192, 8), (8192, 16), (16384, 16), (16384, 32)]
        variants += [CrossEntropyConfig(block_width=width, num_warps=n) for width, n in shapes]
    check_token_losses(partial(_token_losses, knobs), case, machine.device)
    logits, targets = token_loss_inputs(case, machine.device)
    passes = 1 if case.divisor is None else 2
    floor = passes * case.C * case.V * case.dtype.itemsize / machine.bandwidth * 1e6
    for variant in variants:
        taken = time_us(partial(_token_losses, variant, logits, targets, case.divisor), machine.device)
        note = "" if variant is knobs else f"block_width {variant.block_width}, num_warps {variant.num_warps}"
        yield Row(operation="token_losses", case=str(case), what="both", floor=floor, time=taken, note=note)


def _token_losses(knobs: CrossEntropyConfig, logits: Tensor, targets: Tensor, divisor: float | None) -> Tensor:
    return token_losses(logits, targets, divisor, "triton", knobs)


def time_cross_entropy(sizes: tuple[int, int, int], machine: Machine, *, tune: bool) -> Iterator[Row]:
    """The whole operation with a main gradient that holds something, by megabytes of logits in a chunk."""
    T, H, V = sizes
    device = machine.device
    hidden = torch.randn(T, H, dtype=torch.bfloat16, device=device).requires_grad_()
    weight = (torch.randn(V, H, dtype=torch.bfloat16, device=device) / H**0.5).requires_grad_()
    main = MainGradient(torch.zeros(V, H, device=device))
    main.is_filled = True
    set_main_gradient(weight, main)
    targets = torch.randint(V, (T,), device=device)
    flops = 6 * T * H * V
    floor = flops / machine.product_rate * 1e6 + 3 * T * V * 2 / machine.bandwidth * 1e6

    def step(chunk_tokens: int | None) -> None:
        hidden.grad = None
        loss = linear_cross_entropy(
            hidden, weight, targets, T, starts_backward=True, backend="triton", chunk_tokens=chunk_tokens
        )
        loss.backward()

    chunks: dict[str, int | None] = {"": None}
    if tune:
        chunks |= {f"chunks of {n} MiB": max(1, n * MIB // (2 * V) // 128 * 128) for n in (128, 256, 512, 1024)}
    for name, chunk_tokens in chunks.items():
        taken = time_us(partial(step, chunk_tokens), device)
        note = f"{flops / taken / 1e6:.0f} TFLOP/s {name}" if taken else name
        yield Row(
            operation="linear_cross_entropy", case=f"{T}x{H}x{V}", what="both", floor=floor, time=taken, note=note
        )


def time_split_qkv(case: SplitQkvCase, machine: Machine, *, tune: bool) -> Iterator[Row]:
    """Forward, and both passes less the forward one; the reference beside it."""
    check_split_qkv(partial(split_qkv, backend="triton"), case, machine.device)
    given = split_qkv_inputs(case, machine.device)
    knobs = SplitQkvConfig.from_shape(case.D)
    variants: list[SplitQkvConfig | None] = [knobs, None]
    if tune:
        rows, programs = (8, 16, 32, 64), (2, 4, 8, 16)
        variants += [replace(knobs, block_rows_forward=n, block_rows_backward=n) for n in rows]
        variants += [replace(knobs, num_warps=n) for n in (2, 8)]
        variants += [replace(knobs, programs_per_multiprocessor=n) for n in programs if case.weight_dtype]
    one = case.B * case.S * case.G * case.D * case.dtype.itemsize / machine.bandwidth * 1e6
    floor = 2 * (case.per_group + 2) * one
    for variant in variants:
        backend = "reference" if variant is None else "triton"
        operation = partial(split_qkv, *given.arguments, backend=backend, config=variant)

        def both(operation: Callable[[], tuple[Tensor, ...]] = operation) -> None:
            torch.autograd.grad(operation(), given.leaves, given.d_outputs)

        forward = time_us(operation, machine.device)
        backward = time_us(both, machine.device) - forward
        note = "" if variant is knobs else ("reference" if variant is None else _changed(variant, knobs))
        more = (case.per_group + 1) * one if case.weight_dtype else 0.0
        yield Row(operation="split_qkv", case=str(case), what="forward", floor=floor, time=forward, note=note)
        yield Row(operation="split_qkv", case=str(case), what="backward", floor=floor + more, time=backward, note=note)


def _changed(variant: Any, knobs: Any) -> str:
    before = asdict(knobs)
    return ", ".join(f"{key} {value}" for key, value in asdict(variant).items() if value != before[key])


def time_embedding(case: EmbeddingCase, machine: Machine, *, tune: bool) -> Iterator[Row]:
    """The backward pass into a main gradient that holds something; beside it torch's own, into a fresh gradient."""
    check_embedding(partial(embedding, backend="triton"), case, machine.device, main="filled")
    tokens, weight, d_out = embedding_inputs(case, machine.device)
    words = len(tokens.unique())
    floor = (case.T * case.H * case.dtype.itemsize + 2 * words * case.H * 4) / machine.bandwidth * 1e6
    own = partial(torch.ops.aten.embedding_dense_backward, d_out, tokens, case.V, -1, False)
    row = partial(Row, operation="embedding", case=str(case), what="backward", floor=floor)
    yield row(time=time_us(own, machine.device), note="torch's own")
    main = MainGradient(torch.zeros(weight.shape, device=machine.device))
    main.is_filled = True
    set_main_gradient(weight, main)
    knobs = EmbeddingConfig.from_shape(case.H)
    variants = [knobs]
    if tune:
        variants += [replace(knobs, block_tokens=n) for n in (2, 4, 16)]
        variants += [replace(knobs, block_width=n) for n in (256, 1024)]
    for variant in variants:
        operation = partial(embedding, tokens, weight, backend="triton", config=variant)
        forward = time_us(operation, machine.device)

        def both(operation: Callable[[], Tensor] = operation) -> None:
            operation().backward(d_out)

        yield row(time=time_us(both, machine.device) - forward, note=_changed(variant, knobs))


def time_attention(sizes: tuple[int, int, int, int, int], machine: Machine, *, tune: bool) -> Iterator[Row]:
    """Causal attention by torch's kernels, of rows as split_qkv leaves them."""
    B, S, N, G, D = sizes
    device = machine.device
    leaves = [torch.randn(B, S, heads, D, dtype=torch.bfloat16, device=device).requires_grad_() for heads in (N, G, G)]
    heads = [leaf.transpose(1, 2) for leaf in leaves]
    d_out = torch.randn(B, S, N, D, dtype=torch.bfloat16, device=device).transpose(1, 2)
    flops = 2 * B * N * S * S * D
    for name in ("auto", "flash") if device.type == "cuda" else ("auto",):
        kernels = choose_attention(name, device)

        def both(kernels: Any = kernels) -> None:
            torch.autograd.grad(kernels.causal(*heads, None), leaves, d_out)

        forward = time_us(partial(kernels.causal, *heads, None), device)
        for what, taken, count in (("forward", forward, 1.0), ("both", time_us(both, device), 3.5)):
            note = f"{name}: {count * flops / taken / 1e6:.0f} TFLOP/s" if taken else name
            floor = count * flops / machine.product_rate * 1e6
            yield Row(
                operation="attention", case="x".join(map(str, sizes)), what=what, floor=floor, time=taken, note=note
            )


OPERATIONS = {
    "token_losses": (time_token_losses, REAL_TOKEN_LOSSES, SMALL_TOKEN_LOSSES[3:5]),
    "split_qkv": (time_split_qkv, REAL_SPLIT_QKV, SMALL_SPLIT_QKV[2:6]),
    "embedding": (time_embedding, REAL_EMBEDDING, SMALL_EMBEDDING[2:4]),
    "attention": (time_attention, ATTENTION, [(1, 16, 4, 2, 8)]),
    "cross_entropy": (time_cross_entropy, HEADS, [(40, 8, 50)]),
}
"""How each is timed, on which cases, and on which a CPU tries the plumbing."""


HEAD = "| operation | case | pass | floor us | us | of floor | |\n|---|---|---|--:|--:|--:|---|"

if __name__ == "__main__":
    sys.exit(run("layer_kernels", __doc__, "A layer's other kernels", HEAD, OPERATIONS))
