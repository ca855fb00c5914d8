"""Where each parameter stands in the flat buffers of Megatron's distributed optimizer, as `distrib_optim.pt` has them.

A model chunk has one buffer for each pair of dtypes, and others for experts with process groups of their own. A buffer
holds its parameters in reverse order, each from a multiple of 64 elements; it is cut into buckets, and the padding at a
bucket's end is not saved (megatron-core 0.19: optimizer/distrib_optimizer.py, _compute_per_buffer_param_layout and
get_parameter_state_dp_zero). So the number of data-parallel ranks shows only where it decides about buckets.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

_ALIGNMENT = 64
_DEFAULT_BUCKET, _DEFAULT_BUCKET_PER_RANK = 40_000_000, 1_000_000


@dataclass(frozen=True, slots=True)
class Flat:
    """A parameter as a buffer sees it. `alone` has a bucket of its own: an embedding that two stages share."""

    numel: int
    alone: bool = False


def buffer_layout(parameters: Sequence[Flat], bucket_size: int | None) -> tuple[list[int], int]:
    """(the first element of each parameter, the buffer's length) for parameters in the order of the model.

    A bucket is closed as soon as it has `bucket_size` elements; None makes one bucket.
    """
    starts = [0] * len(parameters)
    before, at, begun = 0, 0, False
    for number in reversed(range(len(parameters))):
        flat = parameters[number]
        at = -(-at // _ALIGNMENT) * _ALIGNMENT
        if flat.alone and begun:
            before, at = before + at, 0
        starts[number] = before + at
        at, begun = at + flat.numel, True
        if flat.alone or (bucket_size is not None and at >= bucket_size):
            before, at, begun = before + at, 0, False
    return starts, before + at


def bucket_size(args: Namespace | None, *, numel: int, data_parallel_size: int) -> int | None:
    """The elements of a bucket in a run with these arguments and `numel` parameters on the rank; None: one bucket.

    Megatron makes buckets only to overlap their reduction with the backward pass.
    """
    if not getattr(args, "overlap_grad_reduce", False):
        return None
    count, size = getattr(args, "ddp_num_buckets", None), getattr(args, "ddp_bucket_size", None)
    if isinstance(count, int) and count > 0:
        return numel // count
    if isinstance(size, int) and size > 0:
        return size
    context = getattr(args, "context_parallel_size", 1)
    ranks = data_parallel_size * (context if isinstance(context, int) else 1)
    return max(_DEFAULT_BUCKET, _DEFAULT_BUCKET_PER_RANK * ranks)
