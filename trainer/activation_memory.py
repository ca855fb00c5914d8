"""How a decoder's layers hold what their backward pass needs: on the GPU, computed again, or in the host's memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ckptbridge.trainer.decoder import Decoder
from ckptbridge.trainer.offload import LEAST_BYTES, Offload
from ckptbridge.trainer.recompute import Pack, Unpack, checkpointed, forgetting

Recompute = Literal["none", "selective", "full"]


def spare_memory(
    decoder: Decoder, *, recompute: Recompute, offload: bool, least_bytes: int = LEAST_BYTES
) -> Offload | None:
    """From now on the decoder's layers keep less; losses and gradients stay the same bit for bit.

    Returns the host's side of the activations where they are offloaded.
    """
    host = Offload(decoder.parameters(), len(decoder.decoder.layers), least_bytes) if offload else None

    def run_layer(number: int, layer: Callable[..., Any], *inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return layer(*inputs)
        if recompute == "full":
            return checkpointed(layer, *_summed(*inputs))
        with nullcontext() if host is None else host.layer(number) as tensors:
            pack, unpack = (_as_it_is, _as_it_is) if tensors is None else (tensors.pack, tensors.unpack)
            with _hooks(pack, unpack, forgets=recompute == "selective"):
                return layer(*inputs)

    if recompute != "none" or host is not None:
        decoder.run_layer = run_layer
    return host


def _summed(x: Tensor, pending: Tensor | None, *others: Any) -> tuple[Any, ...]:
    """A layer's inputs with nothing pending: one tensor is kept, not two."""
    return x if pending is None else x + pending, None, *others


def _hooks(pack: Pack, unpack: Unpack, *, forgets: bool) -> Any:
    return forgetting(pack, unpack) if forgets else saved_tensors_hooks(pack, unpack)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
