"""What megatron-core 0.19 needs to run without a GPU: a device, streams and random states that are not there."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class OnCpu(TorchFunctionMode):
    """`with OnCpu():` a tensor that is asked for on the GPU is on the CPU.

    The sliding window's mask is made with device="cuda", tied embeddings are moved with `.cuda()`.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class _NoStream:
    """Stands for a CUDA stream and its events, with which token dispatch copies its counts to the host."""

    def wait_stream(self, stream: _NoStream) -> None: ...

    def record_event(self) -> _NoStream:
        return self

    def synchronize(self) -> None: ...


class _LayerNormFromOne(torch.nn.LayerNorm):
    """Transformer Engine's LayerNorm with a zero-centered weight, which megatron-core's CPU norm refuses to be."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.float() + 1, self.bias.float()
        return F.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps).to(input.dtype)


class _RmsNormFromOne(torch.nn.RMSNorm):
    """The same of RMSNorm."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float() + 1, self.eps).to(x.dtype)


def patch() -> None:
    """Change torch and megatron.core in this process; call it once, before a model is built."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    plain = WrappedTorchNorm.__new__

    def made(cls: Any, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> torch.nn.Module:
        if not config.layernorm_zero_centered_gamma:
            return plain(cls, config, hidden_size, eps, **kwargs)
        kind = _LayerNormFromOne if config.normalization == "LayerNorm" else _RmsNormFromOne
        return kind(hidden_size, eps=eps)

    WrappedTorchNorm.__new__ = made
    torch.cuda.current_device = lambda: torch.device("cpu")  # passed as device= all over megatron.core
    torch.cuda.synchronize = lambda: None  # after a save
    torch.cuda.Stream = torch.cuda.current_stream = _NoStream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    # Dropout is off, so which random state it would draw from does not matter.
    CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()

    # Split sizes reach the host as lists from a GPU, but stay tensors on a CPU, and gloo refuses those.
    all_to_all = dist.all_to_all_single

    def all_to_all_of_lists(*args: Any, **kwargs: Any) -> Any:
        for name in ("output_split_sizes", "input_split_sizes"):
            if isinstance(kwargs.get(name), torch.Tensor):
                kwargs[name] = kwargs[name].tolist()
        return all_to_all(*args, **kwargs)

    dist.all_to_all_single = all_to_all_of_lists
