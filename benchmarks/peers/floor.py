"""The floor of a slice on the GPU at hand: its matrix products and its attention, each timed alone.

Experts are counted as one dense product with as many rows as they get together, so a grouped product that is as fast as
a dense one meets the floor. Norms, routing, sorting, activations, sums and roundings are counted as free; the optimizer
moves 30 bytes a parameter (bf16 weight written, fp32 gradient read, fp32 main weight and moments read and written) at
the rate of a device copy. What runs below it has found a faster product.

Shapes: T tokens, K top-k, H hidden_size, V vocab_size, B sequences, S sequence length.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import torch
from slices import Slice
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ckptbridge.trainer.decoder import Decoder

BYTES_A_PARAMETER = 2 + 4 + 8 + 16


def products(slice_: Slice) -> Iterator[tuple[int, int, int, int]]:
    """Every linear layer of the slice: how many there are, rows, inputs, outputs."""
    config, tokens = slice_.config, slice_.tokens
    hidden, heads = config.hidden_size, config.num_attention_heads * config.kv_channels
    yield config.num_layers, tokens, hidden, heads + 2 * config.num_query_groups * config.kv_channels
    yield config.num_layers, tokens, heads, hidden
    routed, ffn = tokens * config.moe_router_topk, config.moe_ffn_hidden_size or 0
    yield config.num_layers, routed, hidden, 2 * ffn
    yield config.num_layers, routed, ffn, hidden
    if shared := config.moe_shared_expert_intermediate_size:
        yield config.num_layers, tokens, hidden, 2 * shared
        yield config.num_layers, tokens, shared, hidden
    yield 1, tokens, hidden, config.vocab_size


def floor_ms(slice_: Slice, device: torch.device) -> tuple[float, float, int]:
    """Milliseconds of forward and backward, of the whole step, and the number of parameters."""
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in Decoder(slice_.config).parameters())
    alone = sum(count * linear_ms(rows, inputs, outputs, device) for count, rows, inputs, outputs in products(slice_))
    alone += slice_.config.num_layers * attention_ms(slice_, device)
    return alone, alone + BYTES_A_PARAMETER * parameters / copy_bytes_per_ms(device), parameters


def linear_ms(rows: int, inputs: int, outputs: int, device: torch.device) -> float:
    """A linear layer's three products: output, input's gradient, weight's gradient."""
    x, d_out, weight = (
        torch.randn(shape, device=device).bfloat16() for shape in ((rows, inputs), (rows, outputs), (outputs, inputs))
    )
    calls: list[Callable[[], Tensor]] = [lambda: x @ weight.t(), lambda: d_out @ weight, lambda: d_out.t() @ x]
    return sum(median_ms(call) for call in calls)


def attention_ms(slice_: Slice, device: torch.device) -> float:
    """cuDNN's causal attention, forward and backward."""
    config = slice_.config
    shapes = [
        (slice_.micro_batch_size, heads, slice_.sequence_length, config.kv_channels)
        for heads in (config.num_attention_heads, config.num_query_groups, config.num_query_groups)
    ]
    q, k, v = (torch.randn(shape, device=device).bfloat16().requires_grad_() for shape in shapes)

    def both() -> None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.autograd.grad(out, (q, k, v), d_out)

    d_out = torch.randn(shapes[0], device=device).bfloat16()
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return median_ms(both)


def copy_bytes_per_ms(device: torch.device) -> float:
    """Bytes read and bytes written a millisecond, of a copy of 2 GiB."""
    source = torch.empty(2**31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source))


def median_ms(call: Callable[[], object], times: int = 10) -> float:
    """Of so many calls, after three more that nobody counts."""
    for _ in range(3):
        call()
    taken = []
    for _ in range(times):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end))
    return statistics.median(taken)
