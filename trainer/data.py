"""Batches of sequences from a flat file of tokens, in an order drawn by a seed, from a position that can be saved.

Shapes: B sequences, S sequence_length.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ckptbridge.converters.errors import BadInputError
from ckptbridge.trainer.recipe import DataSection
from ckptbridge.trainer.tokens import Tokens


class TokenStream:
    """Sequences of S + 1 tokens (S inputs, each with the next one as its target), without end.

    Sequence i starts at token i * S, so every token is predicted once an epoch. Each epoch has its own order,
    drawn from (seed, epoch). The state is the number of sequences that were handed out: resuming is exact.
    """

    def __init__(self, tokens: Tokens, options: DataSection) -> None:
        self.length, self.seed = options.sequence_length, options.seed
        self.consumed = 0
        self._tokens, self._digest = tokens.train, tokens.digest
        self.sequences = count_sequences(tokens.train, self.length)
        if not self.sequences:
            raise BadInputError(
                f"data: the text to train on has {len(tokens.train)} tokens, too few for one sequence of "
                f"{self.length} + 1; add text or lower data.sequence_length"
            )
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def next(self, count: int) -> Tensor:
        """The next `count` sequences, int64 [count, S + 1]."""
        starts = [self._start(self.consumed + i) for i in range(count)]
        self.consumed += count
        return _cut(self._tokens, starts, self.length)

    def state_dict(self) -> dict[str, Any]:
        """A few plain values from which `load_state_dict` continues exactly."""
        return {
            "consumed": self.consumed,
            "sequence_length": self.length,
            "seed": self.seed,
            "tokens": self._digest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises BadInputError if it was taken from other data."""
        mine = self.state_dict()
        for key, what in (("sequence_length", "data.sequence_length"), ("seed", "data.seed"), ("tokens", "the text")):
            if state[key] != mine[key]:
                raise BadInputError(
                    f"the checkpoint was trained with another order of data: {what} was {state[key]!r}, now it is "
                    f"{mine[key]!r}; restore it, or start a new run_folder from the checkpoint"
                )
        self.consumed = state["consumed"]

    def _start(self, index: int) -> int:
        epoch, position = divmod(index, self.sequences)
        if epoch != self._epoch:
            # One stream of random numbers a (seed, epoch) pair: SeedSequence keeps neighbouring pairs apart.
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
            self._epoch, self._order = epoch, generator.permutation(self.sequences)
        return int(self._order[position]) * self.length


def held_out_batches(tokens: Tokens, options: DataSection, batches: int) -> list[Tensor]:
    """The same first micro-batches of the held-out text each time; fewer if there is less text, none if off.

    Raises BadInputError when text is held out but too short for a single sequence.
    """
    if not options.held_out_fraction:
        return []
    length, size = options.sequence_length, options.micro_batch_size
    available = count_sequences(tokens.held_out, length)
    if not available:
        raise BadInputError(
            f"data: the held-out documents have {len(tokens.held_out)} tokens, too few for one sequence of "
            f"{length} + 1; raise data.held_out_fraction or lower data.sequence_length"
        )
    starts = [i * length for i in range(min(available, batches * size))]
    return [_cut(tokens.held_out, starts[i : i + size], length) for i in range(0, len(starts), size)]


def count_sequences(tokens: NDArray[np.integer[Any]], length: int) -> int:
    """How many sequences of `length` + 1 tokens, each starting at the other's last, the tokens hold."""
    return max(0, (len(tokens) - 1) // length)


def _cut(tokens: NDArray[np.integer[Any]], starts: list[int], length: int) -> Tensor:
    return torch.from_numpy(np.stack([tokens[start : start + length + 1].astype(np.int64) for start in starts]))
