"""What a run computes with: device, dtype, threads and kernels, chosen once."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ckptbridge.converters.errors import BadInputError
from ckptbridge.kernels.backend import Backend, BackendError, choose_backend
from ckptbridge.trainer.attention_kernels import AttentionKernels, choose_attention
from ckptbridge.trainer.products import ProductsName, choose_products
from ckptbridge.trainer.recipe import Recipe
from ckptbridge.trainer.transformer_engine.limits import refuse_beyond_transformer_engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """`backend` is the kernels' name; `reason` is the sentence that says why it was taken."""

    device: torch.device
    dtype: torch.dtype
    backend: Backend
    reason: str
    attention: AttentionKernels
    products: ProductsName


@contextmanager
def machine_of(recipe: Recipe) -> Generator[Machine]:
    """The machine that a recipe asks for; thread count is as before afterwards, and the seed is set.

    Raises BadInputError when there is no such device, or it cannot run the kernels.
    """
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise BadInputError("device: cuda was asked for, but torch sees no GPU; use auto or cpu")
    if recipe.memory.offload != "none" and (recipe.device == "cpu" or not torch.cuda.is_available()):
        raise BadInputError(
            "memory.offload: activations leave a GPU's memory, but this run is on a CPU; set it to none"
        )
    wants_gpu = recipe.device == "cuda" or (recipe.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda", torch.cuda.current_device()) if wants_gpu else torch.device("cpu")
    try:
        choice = choose_backend(recipe.kernels.backend, device)
    except BackendError as error:
        raise BadInputError(f"kernels.backend: {error}") from error
    if choice.name == "transformer_engine":
        refuse_beyond_transformer_engine(recipe)
    attention = choose_attention(recipe.kernels.attention, device)
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    products = choose_products(recipe.kernels.products, device, dtype, choice.name)
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.threads or threads)
    torch.manual_seed(recipe.seed)
    try:
        yield Machine(
            device=device,
            dtype=dtype,
            backend=choice.name,
            reason=str(choice),
            attention=attention,
            products=products,
        )
    finally:
        torch.set_num_threads(threads)
