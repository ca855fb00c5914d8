"""Random numbers by name: the same whoever draws them, in whatever order and after whatever resume."""

from __future__ import annotations

import hashlib

import torch


def generator_for(seed: int, *names: str | int) -> torch.Generator:
    """A generator of its own for what is named, e.g. ("order", layer, group)."""
    digest = hashlib.blake2b(repr((seed, *names)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
