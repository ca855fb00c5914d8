"""Which of torch's attention kernels run: cuDNN's first on a GPU, or those that a recipe names.

Shapes: B batch, N heads, G query groups, S sequence, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import attention
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ckptbridge.converters.errors import BadInputError

AttentionName = Literal["auto", "cudnn", "flash", "flash3", "flash4", "math"]

_CUDNN_FIRST = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
_BY_NAME = {
    "cudnn": (SDPBackend.CUDNN_ATTENTION,),
    "flash": (SDPBackend.FLASH_ATTENTION,),
    "flash3": (SDPBackend.FLASH_ATTENTION,),
    "flash4": (SDPBackend.FLASH_ATTENTION,),
    "math": (SDPBackend.MATH,),
}
_FLASH = {"flash3": ("FA3", "flash_attn_interface"), "flash4": ("FA4", "flash_attn.cute")}
"""What torch calls a later FlashAttention, and the module that brings it."""
_CUDNN_WIDTHS = range(64, 129, 8)
"""The head dims that `auto` gives to cuDNN; for others torch's own order holds."""


@dataclass(frozen=True, slots=True)
class AttentionKernels:
    """A choice that runs on the device it was made for; see `choose_attention`."""

    name: AttentionName = "auto"

    def causal(self, q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, scale: float | None) -> Tensor:
        """Causal attention [B, N, S, D of the values], in the memory order of the queries where the kernel keeps it.

        Nothing is copied on the way: cuDNN and FlashAttention take queries, keys and values of any strides as long as
        the channels of a head are neighbours.
        """
        with self._in_force(q_BNSD):
            return F.scaled_dot_product_attention(
                q_BNSD, k_BGSD, v_BGSD, is_causal=True, scale=scale, enable_gqa=q_BNSD.shape[1] > k_BGSD.shape[1]
            )

    @contextmanager
    def _in_force(self, q_BNSD: Tensor) -> Iterator[None]:
        fits_cudnn = q_BNSD.dtype == torch.bfloat16 and q_BNSD.shape[-1] in _CUDNN_WIDTHS
        if self.name == "auto" and not (q_BNSD.is_cuda and fits_cudnn):
            yield
            return
        order = _CUDNN_FIRST if self.name == "auto" else _BY_NAME[self.name]
        with sdpa_kernel(list(order), set_priority=True):
            yield


def choose_attention(name: AttentionName, device: torch.device) -> AttentionKernels:
    """The kernels of a run. `flash3` and `flash4` take FlashAttention's place in torch for the whole process.

    Raises BadInputError naming what is missing when they cannot run on `device`.
    """
    if name in ("auto", "math"):
        return AttentionKernels(name)
    if device.type != "cuda":
        raise BadInputError(f"kernels.attention: {name} runs on a GPU, but this run is on {device}; use auto or math")
    if name == "cudnn" and not torch.backends.cudnn.is_available():
        raise BadInputError("kernels.attention: cudnn was asked for, but this torch comes without cuDNN; use auto")
    if name in _FLASH:
        _activate(name)
    elif name == "flash" and getattr(attention, "current_flash_attention_impl", lambda: None)() is not None:
        attention.restore_flash_attention_impl()
    return AttentionKernels(name)


def _activate(name: AttentionName) -> None:
    version, module = _FLASH[name]
    others = ", ".join(other for other in get_args(AttentionName) if other not in _FLASH)
    if find_spec(module.partition(".")[0]) is None:
        raise BadInputError(f"kernels.attention: {name} needs the module {module}, not installed; use one of {others}")
    if not hasattr(attention, "activate_flash_attention_impl"):
        raise BadInputError(f"kernels.attention: torch {torch.__version__} does not know {name}; use one of {others}")
    try:
        attention.activate_flash_attention_impl(version)
    except (ImportError, RuntimeError, ValueError) as error:
        raise BadInputError(f"kernels.attention: {name} does not start: {error}; use one of {others}") from error
