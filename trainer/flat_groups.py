"""Parameters side by side in contiguous buffers, so that one kernel updates all of them.

A group holds parameters of one dtype that decay alike. Each begins at a multiple of `ALIGNED` elements (256 bytes in
bf16), and what lies between them is zero in every buffer and stays zero.
"""

# Shapes: n elements of a group, padding included.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ckptbridge.kernels.main_gradient import MainGradient, set_main_gradient

ALIGNED = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Where one parameter lies in its group: elements [start, stop)."""

    start: int
    stop: int
    shape: torch.Size

    def of(self, flat: Tensor) -> Tensor:
        """This parameter's view of one of the group's buffers."""
        return flat[self.start : self.stop].view(self.shape)


class FlatGroup:
    """Weights, fp32 main weights, fp32 gradients and Adam's moments of some parameters, a flat buffer each.

    The parameters become views of `weight` and get main gradients. Where weights are fp32, `main` is `weight`.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        weight_decay: float,
        moments: torch.dtype,
        wants_squares: bool = False,
        first: int,
    ) -> None:
        """`first` is the position of the group's first element among those of all groups.

        While the weights move there are two copies of them, before anything else of the group is allocated.
        """
        self.weight_decay, self.first = weight_decay, first
        self.slots, self.numel = _slots(parameters)
        some = next(iter(parameters.values()))
        self.weight = some.new_zeros(self.numel, requires_grad=False)
        with torch.no_grad():
            for name, parameter in parameters.items():
                view = self.slots[name].of(self.weight)
                view.copy_(parameter)
                parameter.data = view
        if self.weight.is_cuda:
            torch.cuda.empty_cache()  # what held the weights is many small pieces, none of which fits a flat buffer
        self.main = self.weight if some.dtype == torch.float32 else self.weight.float()
        self.exp_avg, self.exp_avg_sq = (torch.zeros_like(self.main, dtype=moments) for _ in range(2))
        self.gradient = torch.zeros_like(self.main)
        self._main_gradients = {
            name: MainGradient(slot.of(self.gradient), wants_squares=wants_squares) for name, slot in self.slots.items()
        }
        for name, parameter in parameters.items():
            set_main_gradient(parameter, self._main_gradients[name])
            parameter.register_post_accumulate_grad_hook(_collect)

    @property
    def rounded_weight(self) -> Tensor | None:
        """The weights, if they are something else than the main weights."""
        return None if self.weight is self.main else self.weight

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """One of the group's buffers by parameter name."""
        return {name: slot.of(flat) for name, slot in self.slots.items()}

    def finish_gradient(self) -> tuple[list[Tensor], list[Tensor]]:
        """End the gradients of the step, zero where none came; the next contribution starts new ones.

        Returns the stretches of `gradient` of which no sum of squares is known, and numbers that add up to those of
        the others.
        """
        unknown, known, start = list[Tensor](), list[Tensor](), 0
        for name, slot in self.slots.items():
            main_gradient = self._main_gradients[name]
            main_gradient.finish()
            if main_gradient.squares is not None:
                known.append(main_gradient.squares)
                unknown.append(self.gradient[start : slot.start])
                start = _aligned(slot.stop)
        unknown.append(self.gradient[start:])
        return [stretch for stretch in unknown if stretch.numel()], known

    def forget_gradient(self) -> None:
        """The next contribution starts new gradients, whatever came so far."""
        for main_gradient in self._main_gradients.values():
            main_gradient.is_filled = False

    def round_weights(self) -> None:
        """Weights that are no main weights themselves become the rounding of theirs."""
        if self.weight is not self.main:
            self.weight.copy_(self.main)


def flat_groups(
    parameters: Mapping[str, nn.Parameter], *, weight_decay: float, moments: torch.dtype, wants_squares: bool = False
) -> list[FlatGroup]:
    """The parameters in groups by dtype and decay: matrices decay, norms and biases do not.

    Megatron-Core's rule, to whom each expert's bias is a vector of its own; here they are stacked.
    """
    alike: dict[tuple[torch.dtype, float], dict[str, nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decay = 0.0 if parameter.ndim < 2 or name.endswith("bias") else weight_decay
        alike.setdefault((parameter.dtype, decay), {})[name] = parameter
    groups, first = list[FlatGroup](), 0
    for (_, decay), members in alike.items():
        groups.append(FlatGroup(members, weight_decay=decay, moments=moments, wants_squares=wants_squares, first=first))
        first += groups[-1].numel
    return groups


def _slots(parameters: Mapping[str, nn.Parameter]) -> tuple[dict[str, Slot], int]:
    slots, end = dict[str, Slot](), 0
    for name, parameter in parameters.items():
        slots[name] = Slot(start=end, stop=end + parameter.numel(), shape=parameter.shape)
        end = _aligned(end + parameter.numel())
    return slots, end


def _aligned(end: int) -> int:
    """Where the next parameter may begin."""
    return -(-end // ALIGNED) * ALIGNED


def _collect(parameter: Tensor) -> None:
    """What autograd itself has summed goes to the main gradient."""
    if parameter.grad is not None:
        parameter.main_gradient.add(parameter.grad)  # pyright: ignore[reportAttributeAccessIssue]
        parameter.grad = None
