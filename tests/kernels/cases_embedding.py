"""Shapes of embedding, real ones and awkward ones."""

# Shapes: T tokens, V vocab_size, H hidden_size.

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.kernels.cases import BF16, FP32, T


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingCase:
    """Tokens [T], weight [V, H]; of the words only the first `used` stand in the text."""

    T: int
    V: int
    H: int
    used: int | None = None
    model: str = ""
    dtype: torch.dtype = BF16

    def __str__(self) -> str:
        used = "" if self.used is None else f"-{self.used}-used"
        return f"{self.model or 'small'}-{self.T}x{self.V}x{self.H}{used}-{str(self.dtype).removeprefix('torch.')}"


# No token, one, one word that takes all, words that are never seen, runs that end within a block, odd widths.
SMALL_EMBEDDING = [
    EmbeddingCase(T=0, V=5, H=8),
    EmbeddingCase(T=1, V=1, H=1),
    EmbeddingCase(T=40, V=7, H=16),
    EmbeddingCase(T=33, V=9, H=24, used=1),
    EmbeddingCase(T=17, V=100, H=577),
    EmbeddingCase(T=64, V=20, H=600, used=3, dtype=FP32),
    EmbeddingCase(T=9, V=3, H=40, dtype=FP32),
]
REAL_EMBEDDING = [
    EmbeddingCase(T=T, V=128256, H=4096, model="llama3-8b"),
    EmbeddingCase(T=T, V=151936, H=2048, used=2000, model="qwen3-30b-a3b"),
    EmbeddingCase(T=T, V=32768, H=6144, used=1, model="mixtral-8x22b-one-word"),
]
