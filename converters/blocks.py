"""The bytes of tensors, a block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import xxhash
from torch import Tensor

from ckptbridge.converters.reading import read_exactly
from ckptbridge.converters.tensors import Extent, LazyTensor


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes; a copy if they do not lie in order."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # pyright: ignore


def row_blocks(tensor: LazyTensor, budget_nbytes: int) -> Iterator[memoryview]:
    """The bytes of a tensor that has to be computed, a few rows at a time."""
    if not tensor.nbytes:
        return
    count = tensor.shape[0] if tensor.shape else 1
    step = max(1, budget_nbytes // max(1, tensor.work_row_nbytes))
    for start in range(0, count, step):
        rows = tensor.read_rows(start, min(count, start + step))
        yield memoryview(rows.contiguous().reshape(-1).view(torch.uint8).numpy())  # pyright: ignore


def stored_blocks(extents: Sequence[Extent], budget_nbytes: int) -> Iterator[memoryview]:
    """The bytes of these ranges in order. A block is valid until the next one is asked for."""
    buffer = memoryview(bytearray(min(budget_nbytes, max((extent.nbytes for extent in extents), default=0))))
    for extent in extents:
        for start in range(0, extent.nbytes, budget_nbytes):
            block = buffer[: min(budget_nbytes, extent.nbytes - start)]
            if extent.path is None:
                block[:] = bytes(len(block))
            else:
                read_exactly(extent.path, extent.offset + start, block)
            yield block


def digest_of(tensor: LazyTensor, budget_nbytes: int = 1 << 20) -> str:
    """The XXH3-64 digest of a tensor's bytes, read in blocks, however many bytes one of its rows has."""
    digest = xxhash.xxh3_64()
    extents = tensor.extents()
    for block in row_blocks(tensor, budget_nbytes) if extents is None else stored_blocks(extents, budget_nbytes):
        digest.update(block)
    return digest.hexdigest()
