"""Which implementation of the grouped products runs: a choice of its own beside that of the operations around them.

| products           | what runs                                                    | where                            |
|--------------------|--------------------------------------------------------------|----------------------------------|
| reference          | an expert after another; a GPU's host waits for row counts   | everywhere                       |
| torch              | torch._grouped_mm, in bf16                                   | GPU, CPU                         |
| triton             | the kernels of this package                                  | GPU; CPU with TRITON_INTERPRET=1 |
| quack              | QuACK's CuTe kernels, in bf16                                | Hopper and later, with QuACK     |
| transformer_engine | cuBLAS on several streams, in bf16; waits for the row counts | GPU, with Transformer Engine     |
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

from ckptbridge.kernels.backend import BackendError, obstacle
from ckptbridge.kernels.grouped_quack import quack_obstacle

ProductsBackend = Literal["reference", "torch", "triton", "quack", "transformer_engine"]
PRODUCTS_BACKENDS: tuple[ProductsBackend, ...] = get_args(ProductsBackend)

WAITING: tuple[ProductsBackend, ...] = ("reference", "transformer_engine")
"""Those that read on the host where experts' rows end, so that no CUDA graph can hold them."""
MULTIPLES_OF_8: tuple[ProductsBackend, ...] = ("torch", "quack", "transformer_engine")
"""Those that take bf16 alone and rows of a multiple of 16 bytes."""


def products_obstacle(name: ProductsBackend, device: torch.device) -> str | None:
    """Why backend `name` cannot compute grouped products on `device`, as a clause; None when it can."""
    match name:
        case "reference" | "torch":
            return None
        case "quack":
            return quack_obstacle(device)
        case _:
            return obstacle(name, device)


def require_products(name: ProductsBackend, device: torch.device) -> None:
    """Return when backend `name` can compute grouped products on `device`.

    Raises ValueError for a name that does not exist and BackendError, which says what can, for one that cannot run.
    """
    if name not in PRODUCTS_BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(PRODUCTS_BACKENDS)}; found {name!r}")
    if (why_not := products_obstacle(name, device)) is not None:
        available = ", ".join(other for other in PRODUCTS_BACKENDS if products_obstacle(other, device) is None)
        raise BackendError(f"grouped products {name} cannot run on {device}: {why_not}. Available here: {available}.")
