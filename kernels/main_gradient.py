"""The fp32 sum of a weight's gradients over the micro-batches of a step, in memory that persists.

An operation that computes a weight's gradient adds it here inside its matrix product, so no gradient in the weight's
own dtype is ever written. The first contribution of a step overwrites what the last step left: nobody clears buffers.
It does so in every backward pass, also in that of `torch.autograd.grad` for inputs alone: forget gradients behind one.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NAME = "main_gradient"


class MainGradient:
    """A view of a flat fp32 buffer, in the shape of its weight.

    `is_filled` is known to the host and says whether this step has contributed yet. It changes in the same order in
    every step, so a captured CUDA graph repeats what it was captured with.
    """

    def __init__(self, tensor: Tensor, *, wants_squares: bool = False) -> None:
        """With `wants_squares` a product that fills the tensor is asked to leave the sum of its squares as well."""
        if tensor.dtype != torch.float32:
            raise ValueError(f"main gradient: expected dtype torch.float32, found {tensor.dtype}")
        self.tensor = tensor
        self.is_filled = False
        self.wants_squares = wants_squares
        self.squares: Tensor | None = None
        """Numbers that add up to the sum of squares of the tensor as it stands, where what filled it knew them."""

    def target(self) -> tuple[Tensor, bool]:
        """The memory to write into, and whether to add to what is there (else overwrite it). Counts as filled."""
        accumulate, self.is_filled = self.is_filled, True
        self.squares = None
        return self.tensor, accumulate

    def add(self, gradient: Tensor) -> None:
        """Add a gradient of any floating dtype."""
        tensor, accumulate = self.target()
        if accumulate:
            tensor.add_(gradient)
        else:
            tensor.copy_(gradient)

    def add_product(self, a: Tensor, b: Tensor) -> None:
        """Add the matrix product a @ b, which is rounded to nothing less than fp32 on its way."""
        tensor, accumulate = self.target()
        if a.dtype == torch.float32:
            torch.addmm(tensor, a, b, out=tensor) if accumulate else torch.mm(a, b, out=tensor)
        elif a.is_cuda:
            wide = torch.float32
            if accumulate:
                torch.addmm(tensor, a, b, out_dtype=wide, out=tensor)
            else:
                torch.mm(a, b, out_dtype=wide, out=tensor)
        elif accumulate:
            tensor.addmm_(a.float(), b.float())
        else:
            torch.mm(a.float(), b.float(), out=tensor)

    def finish(self) -> Tensor:
        """The sum of the step, zero if nothing contributed; the next contribution starts a new one."""
        if not self.is_filled:
            self.squares = None
            self.tensor.zero_()
        self.is_filled = False
        return self.tensor


def main_gradient_of(weight: Tensor) -> MainGradient | None:
    """Where the gradient of `weight` is summed, or None if autograd is to keep it."""
    return getattr(weight, _NAME, None)


def set_main_gradient(weight: Tensor, gradient: MainGradient) -> None:
    """From now on operations send this weight's gradient there."""
    if gradient.tensor.shape != weight.shape:
        expected, found = tuple(weight.shape), tuple(gradient.tensor.shape)
        raise ValueError(f"main gradient: expected shape {expected} of its weight, found {found}")
    setattr(weight, _NAME, gradient)
