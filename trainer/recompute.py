"""Results that the backward pass computes again instead of keeping: cheap operations, or a whole layer.

Selective: what a norm, a SwiGLU or the like gave is saved by the matrix product behind it, as large as its input and
known from it. Such a result is left out of what autograd keeps; when the product's backward asks for it, the operation
runs again on its kept input. Nothing else runs a second time, and no operation's backward runs twice.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import checkpoint

Pack = Callable[[Tensor], Any]
Unpack = Callable[[Any], Tensor]


def recomputed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """function(*inputs), which under `forgetting` is computed again where a backward pass needs it.

    The function must give the same bits each time and write into none of its inputs.
    """
    return remade(function(*inputs), function, *inputs)


def remade(made: Tensor, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """`made`, which under `forgetting` function(*inputs) makes again; it was made otherwise, to the same bits."""
    if _forgotten and torch.is_grad_enabled() and made.is_contiguous():
        _forgotten[-1][made.data_ptr()] = _Remade(made, function, inputs)
    return made


def checkpointed(function: Callable[..., Any], *inputs: Any) -> Any:
    """function(*inputs), of which nothing but the inputs is kept: the backward pass runs it again first.

    Random numbers are not replayed: nothing in the decoder draws any.
    """
    run = cast(Callable[..., Any], checkpoint.checkpoint)
    return run(function, *inputs, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def forgetting(pack: Pack, unpack: Unpack) -> Generator[None]:
    """Leave what `recomputed` gives out of what autograd keeps; everything else goes through `pack` and `unpack`."""
    made: dict[int, _Remade] = {}

    def packed(tensor: Tensor) -> Any:
        remade = made.get(tensor.data_ptr())
        if remade is None or not remade.is_seen_in(tensor):
            return pack(tensor)
        return remade.use(tensor.shape, pack, unpack)

    def unpacked(kept: Any) -> Tensor:
        return kept() if isinstance(kept, _Use) else unpack(kept)

    _forgotten.append(made)
    try:
        with saved_tensors_hooks(packed, unpacked):
            yield
    finally:
        _forgotten.pop()
        for remade in made.values():
            remade.close()


_forgotten: list[dict[int, _Remade]] = []
"""For each open `forgetting`: what was made in it, by address."""


class _Remade:
    """A result, how to make it again, and how many still want it."""

    def __init__(self, made: Tensor, function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> None:
        # Held until the layer is done, so that no other tensor gets its address meanwhile.
        self._made: Tensor | None = made.detach()
        self._version = made._version
        self._function, self._inputs = function, inputs
        self._kept_inputs: list[Callable[[], Any]] = []
        self._wanted = 0

    def is_seen_in(self, tensor: Tensor) -> bool:
        """Whether a tensor at the same address shows all of the result, as it was made."""
        made = self._made
        if made is None or tensor.numel() != made.numel() or tensor.dtype != made.dtype:
            return False
        return tensor.is_contiguous() and tensor._version == self._version

    def use(self, shape: torch.Size, pack: Pack, unpack: Unpack) -> _Use:
        """Someone's right to the result. The inputs are kept as any tensor is that autograd keeps."""
        if not self._wanted:
            self._kept_inputs = [_kept(value, pack, unpack) for value in self._inputs]
        self._wanted += 1
        return _Use(self, shape)

    def close(self) -> None:
        """Let the result go."""
        self._made, self._inputs = None, ()

    def given(self) -> Tensor:
        """The result, made when it is first asked for and held until all have asked."""
        made = self._made
        if made is None:
            with torch.no_grad():
                made = self._function(*(kept() for kept in self._kept_inputs))
        self._wanted -= 1
        self._made = made if self._wanted > 0 else None
        return made


def _kept(value: Any, pack: Pack, unpack: Unpack) -> Callable[[], Any]:
    if not isinstance(value, Tensor) or isinstance(value, torch.nn.Parameter):
        return lambda: value
    packed = pack(value.detach())
    return lambda: unpack(packed)


class _Use:
    """One operation's right to a result, in the shape that the operation saw."""

    def __init__(self, remade: _Remade, shape: torch.Size) -> None:
        self._remade, self._shape = remade, shape

    def __call__(self) -> Tensor:
        return self._remade.given().view(self._shape)
