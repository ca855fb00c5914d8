"""Who computes the grouped products of a run's experts: chosen by name, and refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch

from ckptbridge.converters.errors import BadInputError
from ckptbridge.kernels.backend import Backend, BackendError
from ckptbridge.kernels.grouped_backend import MULTIPLES_OF_8, WAITING, require_products

ProductsName = Literal["auto", "reference", "torch", "triton", "quack", "transformer_engine"]


def choose_products(
    name: ProductsName, device: torch.device, dtype: torch.dtype, backend: Backend = "reference"
) -> ProductsName:
    """The products of a run of this backend and dtype; `auto` is decided by the shapes of each mixture.

    Raises BadInputError naming what is missing when they cannot run on `device`.
    """
    if name == "auto":
        return name
    if backend == "transformer_engine":
        raise BadInputError(
            f"kernels.products: {name} is for this package's mixtures, and kernels.backend transformer_engine has "
            "NVIDIA's; use auto, or another backend"
        )
    if name != "reference" and dtype != torch.bfloat16:
        raise BadInputError(f"kernels.products: {name} computes in bf16; set precision to bf16, or use auto")
    try:
        require_products(name, device)
    except BackendError as error:
        raise BadInputError(f"kernels.products: {error}") from error
    return name


def refuse_widths(name: ProductsName, matrix: str, widths: Sequence[int]) -> None:
    """Raise BadInputError for an expert's matrix that the products do not take."""
    if name in MULTIPLES_OF_8 and any(width % 8 for width in widths):
        found = " x ".join(map(str, widths))
        others = ", ".join(other for other in get_args(ProductsName) if other not in MULTIPLES_OF_8)
        raise BadInputError(
            f"kernels.products: {name} takes matrices whose widths are multiples of 8, and {matrix} is {found}; "
            f"use one of {others}"
        )


def capture_obstacle(name: ProductsName) -> str | None:
    """Why no step with these products can be a CUDA graph, as a clause; None when nothing of them is against it."""
    if name not in WAITING:
        return None
    return f"kernels.products {name} waits for the number of each expert's rows"
