"""Shapes of grouped matrix products that tests share: small awkward ones, and those of models that are trained."""

# Shapes: R routed rows, T tokens, E experts, K the depth of the sums, N output columns.

from __future__ import annotations

from dataclasses import dataclass

import torch

T = 16384  # tokens of a training step on one GPU


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedCase:
    """Rows of every expert, `unused` rows of garbage behind the last, weights [E, N, K] or [E, K, N]."""

    counts: tuple[int, ...]
    K: int
    N: int
    unused: int = 0
    tokens: int = 24  # that rows are gathered from
    model: str = ""

    @property
    def R(self) -> int:
        return sum(self.counts) + self.unused

    @property
    def experts(self) -> list[slice]:
        """The rows of every expert."""
        ends = [sum(self.counts[: expert + 1]) for expert in range(len(self.counts))]
        return [slice(end - count, end) for end, count in zip(ends, self.counts, strict=True)]

    def __str__(self) -> str:
        counts = "-".join(map(str, self.counts)) if len(self.counts) <= 8 else f"{len(self.counts)}experts"
        return f"{self.model or 'small'}-rows-{counts}-{self.K}x{self.N}-unused-{self.unused}"


# Tests run them with tiles of 32 x 64 and a depth of 32: no rows at all, experts without rows (first, last, inside, two
# in a row), one that takes all, full tiles with and without a partial one, one row, sizes of one tile exactly, of no
# multiple of a tile, and of rows that are no multiple of 16 bytes, which the copy engine refuses.
SMALL = [
    GroupedCase(counts=(0, 0, 0), K=32, N=64, unused=5),
    GroupedCase(counts=(32,), K=32, N=64),
    GroupedCase(counts=(5, 0, 64, 1, 0, 0, 33), K=72, N=136, unused=9),
    GroupedCase(counts=(0, 70, 0), K=40, N=200, unused=40),
    GroupedCase(counts=(3, 31, 32, 97), K=96, N=64),
    GroupedCase(counts=(2, 40), K=37, N=71, unused=3),
]


def _uneven(experts: int, rows: int) -> tuple[int, ...]:
    """Counts that sum up to `rows`, the first expert's the largest but for an empty one."""
    weights = torch.linspace(2, 1, experts)
    weights[1] = 0
    counts = (weights / weights.sum() * rows).int()
    counts[0] += rows - counts.sum()
    return tuple(counts.tolist())


REAL = [
    GroupedCase(counts=_uneven(8, T * 2), K=4096, N=28672, tokens=T, model="llama3-e8t2"),
    GroupedCase(counts=_uneven(8, T * 2), K=16384, N=6144, tokens=T, model="mixtral-8x22b"),
    GroupedCase(counts=_uneven(64, T * 8), K=3584, N=5120, tokens=T, model="qwen2-57b-a14b"),
    GroupedCase(counts=_uneven(128, T * 8), K=2048, N=1536, tokens=T, model="qwen3-30b-a3b"),
    GroupedCase(counts=_uneven(128, T * 8 - 1000), K=768, N=2048, tokens=T, unused=1000, model="qwen3-30b-a3b"),
]

MANY = GroupedCase(counts=(700, 0, 1, 2049, 128, 5000, 0, 333), K=1096, N=1544, unused=77)
"""Several tiles for every multiprocessor, of many steps and of none, and a last wave that is not full."""


def ragged_to_capture(*, rows: int) -> list[GroupedCase]:
    """Ways to spread as many rows over four experts."""
    spread = [(rows // 20, 0, 16 * rows // 25, 31 * rows // 100), (rows, 0, 0, 0), (0, 1, rows - 2, 1)]
    return [GroupedCase(counts=counts, K=72, N=136) for counts in spread]
