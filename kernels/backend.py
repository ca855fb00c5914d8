"""Which implementation of an operation runs, chosen once and by name; and the one door to Triton.

| backend            | runs                                                         | where                            |
|--------------------|--------------------------------------------------------------|----------------------------------|
| reference          | the definition, in plain torch, one operation after another  | everywhere                       |
| torch              | the best torch itself offers: torch.compile of the reference | GPU; CPU with a C++ compiler     |
| triton             | the kernels of this package                                  | GPU; CPU with TRITON_INTERPRET=1 |
| transformer_engine | NVIDIA's modules as a decoder's layers; triton beside them   | GPU with Transformer Engine      |

A kernel file imports `jit` and `tl` from here and never Triton itself: without Triton both are stand-ins, so that every
file still imports and its reference still runs, and asking for the triton backend fails with a sentence.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton ships with the CUDA builds of torch only

    def jit(kernel):
        """Stand in for `triton.jit`: the kernel stays a Python function that nothing calls."""
        return kernel

    triton = tl = None
else:
    jit = triton.jit

Backend = Literal["reference", "torch", "triton", "transformer_engine"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

Function = TypeVar("Function", bound=Callable)


class BackendError(RuntimeError):
    """A backend was asked for that cannot run here; the text names those that can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendChoice:
    """A backend that runs on the device it was chosen for, and why it was chosen."""

    name: Backend
    device: torch.device
    reason: str

    def __str__(self) -> str:
        """The sentence for the log."""
        return f"Kernels on {self.device}: {self.name} ({self.reason})."


def choose_backend(name: Backend | Literal["auto"], device: torch.device | str) -> BackendChoice:
    """Choose the backend of a run: by name, or with "auto" the fastest that the device allows.

    Raises ValueError for a name that does not exist and BackendError for one that cannot run on `device`.
    """
    device = torch.device(device)
    if name != "auto":
        _require(name, device)
        return BackendChoice(name=name, device=device, reason="asked for by name")
    if device.type != "cuda":
        reason = "auto: without a GPU the definition itself is run"
        return BackendChoice(name="reference", device=device, reason=reason)
    if (why_not := obstacle("triton", device)) is not None:
        return BackendChoice(name="reference", device=device, reason=f"auto: not triton, for {why_not}")
    return BackendChoice(name="triton", device=device, reason="auto: the fused kernels run on this GPU")


def require_backend(name: Backend, device: torch.device) -> None:
    """Return when backend `name` can run an operation on tensors of `device`; say what can when it cannot."""
    if name == "transformer_engine":
        raise BackendError(
            "backend transformer_engine has a decoder's layers and no single operations. Give operations what "
            "operations_backend makes of it."
        )
    _require(name, device)


def operations_backend(name: str) -> str:
    """What a decoder of backend `name` gives to the operations of this package that it calls."""
    return "triton" if name == "transformer_engine" else name


def _require(name: Backend, device: torch.device) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}; found {name!r}")
    if (why_not := obstacle(name, device)) is not None:
        available = ", ".join(other for other in BACKENDS if obstacle(other, device) is None)
        raise BackendError(f"backend {name} cannot run on {device}: {why_not}. Available here: {available}.")


def obstacle(name: Backend, device: torch.device) -> str | None:
    """Why backend `name` cannot run on `device`, as a clause; None when it can."""
    if name == "transformer_engine":
        if device.type != "cuda":
            return f"its kernels are written for CUDA, not for {device.type}"
        return _transformer_engine_fault() or obstacle("triton", device)
    if name == "torch" and device.type == "cuda" and tl is None:
        return "torch.compile needs Triton on a GPU, and Triton is not installed"
    if name != "triton":
        return None
    if tl is None:
        return "Triton is not installed (it comes with the CUDA builds of torch)"
    if device.type == "cuda":
        # Triton launches on the current device whatever the tensors say, and would read foreign addresses.
        if device.index not in (None, current := torch.cuda.current_device()):
            return f"the current device is cuda:{current} (call torch.cuda.set_device first)"
        return None
    if device.type == "cpu":
        # Triton reads the variable when a function is decorated, its own ones when it is imported.
        if not isinstance(tl.sum, triton.JITFunction):
            return None
        return "Triton runs on a CPU only with TRITON_INTERPRET=1 in the environment before the first import"
    return f"its kernels are written for CUDA, not for {device.type}"


@functools.cache
def _transformer_engine_fault() -> str | None:
    """Why Transformer Engine cannot be imported, as a clause. Importing loads its libraries, so it is done once."""
    try:
        with warnings.catch_warnings():  # of a package that is only looked at
            warnings.simplefilter("ignore")
            importlib.import_module("transformer_engine.pytorch")
    except ImportError as error:
        return f"Transformer Engine cannot be imported ({error}); pip install transformer-engine[pytorch]"
    except (OSError, RuntimeError, AssertionError) as error:
        # Its libraries belong to one version of torch, cuBLAS and cuDNN, and say so when they are loaded.
        return f"Transformer Engine is installed and does not load ({str(error).strip().splitlines()[0]})"
    return None


@functools.cache
def compiled(reference: Function) -> Function:
    """`reference` under torch.compile, wrapped once a process: the torch backend of a memory-bound operation."""
    return torch.compile(reference)


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """How many programs run side by side on `device` at least: what a persistent grid is sized by."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 2  # interpreted programs run one after another; two, so that small tests loop and have a last, short turn
