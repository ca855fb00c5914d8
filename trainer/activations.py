"""What stands between the two linear layers of an MLP or an expert.

Shapes: F ffn width. A gated unit has rows [gate_proj; up_proj] of 2F, any other rows of F.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.kernels.swiglu import swiglu
from ckptbridge.trainer.recompute import recomputed


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "squared_relu": _squared_relu,
}


def fc1_rows(config: ModelConfig, ffn: int) -> int:
    """How many rows the first linear layer has for an MLP of width `ffn`."""
    return 2 * ffn if config.gated_linear_unit else ffn


def is_swiglu(config: ModelConfig) -> bool:
    """Whether the function is SwiGLU and nothing else, for which there is a kernel."""
    is_plain = config.activation_func_clamp_value is None and not config.glu_linear_offset
    return config.gated_linear_unit and config.activation_func == "silu" and is_plain


def hidden_units(x: Tensor, config: ModelConfig, backend: str) -> Tensor:
    """`activated`, which under selective recompute is computed again where that keeps less.

    SwiGLU's kernel keeps x alone. Other functions keep fp32 copies in any case, and x would stand beside them.
    """
    return recomputed(activated, x, config, backend) if is_swiglu(config) else activated(x, config, backend)


def activated(x: Tensor, config: ModelConfig, backend: str) -> Tensor:
    """Hidden units [..., F] from what the first linear layer gave, [..., 2F] or [..., F].

    The backward pass may write over x: nobody else may have a use for it. Computed in fp32 and rounded once, to the
    dtype of x. `activation_func_clamp_value` cuts what goes into the function from above and the linear half on both
    sides; `glu_linear_offset` is then added to the linear half.
    """
    if is_swiglu(config):
        return swiglu(x, overwrites_x=True, backend=backend)
    limit = config.activation_func_clamp_value
    function = _FUNCTIONS[config.activation_func]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if not config.gated_linear_unit:
        return function(wide if limit is None else wide.clamp(max=limit)).to(x.dtype)
    gate_proj, up_proj = wide.chunk(2, -1)
    if limit is not None:
        gate_proj, up_proj = gate_proj.clamp(max=limit), up_proj.clamp(-limit, limit)
    return (function(gate_proj) * (up_proj + config.glu_linear_offset)).to(x.dtype)
