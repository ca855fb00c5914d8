"""Weights in fp8 with one scale for each block, read as the numbers that they stand for.

w = code * scale of the code's block, computed in fp32 and rounded once. torch converts fp8 at 0.3 GB/s on a CPU; here
the bits of a code are put where fp16 has them, which is exact and ten times as fast.

Shapes: R rows, C columns, blocks of 128 x 128 as a rule; codes [R, C], scales [ceil(R / 128), ceil(C / 128)].
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.tensors import LazyTensor

_LIFT = 256.0
"""2 ** (15 - 7), between the exponent biases of fp16 and e4m3: the bits of a code, moved by 7, are code / 256."""
_SIGN_AND_MAGNITUDE = ~0x4000
"""A signed byte that is widened has its sign in every upper bit; of those that are moved along, fp16 wants one."""
_CHUNK_ELEMENTS = 1 << 17
"""What is worked on at a time: 0.8 MiB of intermediate values fit a second-level cache. A quarter of it is 1.4 times as
slow for the calls, four times as much for the memory."""


@dataclass(frozen=True, slots=True)
class BlockSize:
    """How many rows and columns of a weight share one scale."""

    rows: int
    columns: int

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales of a weight [..., R, C]."""
        return (*shape[:-2], -(-shape[-2] // self.rows), -(-shape[-1] // self.columns))


class BlockScaled(LazyTensor):
    """Matrices of codes under each other, each `height` rows high and with scales of its own.

    `where` names the scales in errors: reading raises BadInputError when one of them is no finite number.
    """

    def __init__(
        self,
        codes: LazyTensor,
        scales: LazyTensor,
        size: BlockSize,
        dtype: torch.dtype,
        *,
        where: str,
        height: int | None = None,
    ) -> None:
        self.codes, self.scales, self.size, self.dtype, self.where = codes, scales, size, dtype, where
        self.shape, self.height = codes.shape, height or codes.shape[0]

    def bases(self) -> Sequence[LazyTensor]:
        return self.codes, self.scales

    def cast(self, dtype: torch.dtype) -> LazyTensor:
        return BlockScaled(self.codes, self.scales, self.size, dtype, where=self.where, height=self.height)

    @property
    def work_row_nbytes(self) -> int:
        """A row of codes and a row of the result. Beside them a thread takes 1.3 MiB, however many rows it reads."""
        return self.codes.work_row_nbytes + self.row_nbytes

    def read_rows(self, start: int, stop: int) -> Tensor:
        made = torch.empty(stop - start, self.shape[1], dtype=self.dtype)
        if not made.numel():
            return made
        codes = self.codes.read_rows(start, stop).view(torch.int8)
        # The only codes that are no numbers, 0x7F and 0xFF, are the largest signed and the largest unsigned byte.
        has_nan = codes.max().item() == 0x7F or codes.view(torch.uint8).max().item() == 0xFF
        bands = list(self._bands(start, stop))
        first = bands[0][0]
        scales, lift = self._scales(first, bands[-1][0] + 1)
        step = max(1, _CHUNK_ELEMENTS // self.shape[1])
        for band, low, high in bands:
            spread = scales[band - first].repeat_interleave(self.size.columns)[: self.shape[1]]
            for at in range(low - start, high - start, step):
                rows = slice(at, min(high - start, at + step))
                _multiply(codes[rows], lift, spread, made[rows])
                if has_nan:
                    made[rows].masked_fill_((codes[rows] & 0x7F) == 0x7F, float("nan"))
        return made

    def _bands(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(row of the scales, first row, last row + 1) for each run of rows that share their scales."""
        per_matrix = -(-self.height // self.size.rows)
        while start < stop:
            matrix, row = divmod(start, self.height)
            band = row // self.size.rows
            end = min(stop, matrix * self.height + min(self.height, (band + 1) * self.size.rows))
            yield matrix * per_matrix + band, start, end
            start = end

    def _scales(self, start: int, stop: int) -> tuple[Tensor, float]:
        """Rows of the scales in fp32, and what the codes are to be lifted by: nothing, if the scales could do it."""
        scales = self.scales.read_rows(start, stop).float()
        lifted = scales * _LIFT  # exact, unless it is too large
        if bool(lifted.isfinite().all()):
            return lifted, 1.0
        finite = scales.isfinite()
        if bool(finite.all()):
            return scales, _LIFT
        row, column = (int(n) for n in (~finite).nonzero()[0])
        raise BadInputError(
            f"{self.where}: the scale at [{start + row}, {column}] is {scales[row, column].item()}, so its block of "
            f"{self.size.rows} x {self.size.columns} weights holds no numbers; copy or download the file again"
        )


class _Scratch(threading.local):
    """The intermediate values of one thread: fresh memory for each chunk would cost as much as the arithmetic."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.int16), torch.empty(0)
        self._shape = torch.Size((0,))
        self._views = self._memory

    def of(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Room for the fp16 and the fp32 numbers of a chunk."""
        if shape != self._shape:
            count = shape.numel()
            if self._memory[0].numel() < count:
                self._memory = torch.empty(count, dtype=torch.int16), torch.empty(count)
            halves, floats = self._memory
            self._shape, self._views = shape, (halves[:count].view(shape), floats[:count].view(shape))
        return self._views


_scratch = _Scratch()


def _multiply(codes: Tensor, lift: float, scales: Tensor, out: Tensor) -> None:
    """out = codes / 256 * lift * scales, for the bytes of e4m3 codes [rows, columns] and a scale for each column."""
    halves, floats = _scratch.of(codes.shape)
    halves.copy_(codes).mul_(128).bitwise_and_(_SIGN_AND_MAGNITUDE)
    floats.copy_(halves.view(torch.float16))
    if lift != 1.0:
        floats.mul_(lift)
    out.copy_(floats.mul_(scales))
