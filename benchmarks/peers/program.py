"""What `train_step.py` times: a program that has built a slice and can take steps on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a program is to train. A program that cannot do one of them raises ValueError."""

    device: torch.device
    seed: int = 0
    moments: torch.dtype = torch.float32
    """Of Adam. Main weights and gradients are fp32."""
    graph: bool = True
    """Replay a captured CUDA graph where the program can."""
    backend: str = "auto"
    """Of our kernels."""
    recompute: Literal["none", "selective"] = "none"
    """What our backward pass computes again instead of keeping it: norms and SwiGLUs, or nothing."""
    norm_in_products: bool = False
    """Our products leave the squares of experts' gradients for the norm."""


class Program(Protocol):
    """One model on one device with its optimizer and one batch of random tokens."""

    parameters: int
    planned_gib: float | None
    """What it says beforehand that a step will have in use; None if it says nothing."""
    description: str
    """What of it is particular: versions of its kernels, what its optimizer keeps."""

    def forward_backward(self) -> Tensor:
        """The loss of the batch, and gradients that replace those of the call before."""
        ...

    def step(self) -> Tensor:
        """The loss of the batch; clip the gradients at norm 1 and update the weights."""
        ...


def random_tokens(shape: tuple[int, int], vocab_size: int, device: torch.device) -> Tensor:
    """Token ids [B, S] that every program gets alike."""
    generator = torch.Generator().manual_seed(1234)
    return torch.randint(0, vocab_size, shape, generator=generator).to(device)
