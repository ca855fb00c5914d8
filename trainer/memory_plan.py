"""What a run will take of the GPU's memory, said before it starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, Literal

import torch

from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.kernels.cross_entropy import CHUNK_NBYTES
from ckptbridge.kernels.experts import ProductsConfig
from ckptbridge.kernels.order import expert_capacity
from ckptbridge.trainer.activation_sizes import Shape, layer_bytes
from ckptbridge.trainer.decoder import Decoder
from ckptbridge.trainer.recipe import Recipe

GIB = 1 << 30
WORKSPACE = 2 * 32 << 20
"""cuBLAS's on Hopper: 32 MiB for each thread that multiplies, forward and backward."""
_STREAMS = 4 * 32 << 20
"""Transformer Engine's grouped products run on four streams, each with a workspace of 32 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes at the moment of a step when most is in use."""

    weights: int
    main_weights: int
    """fp32 copies; none where the weights are fp32."""
    gradients: int
    moments: int
    activations: int
    """What layers keep for the backward pass of one micro-batch, as far as it is on the GPU at that moment."""
    largest_temporary: int
    """The most that lives beside them, within a layer's backward pass or while the loss is computed."""
    logits_chunk: int
    """Logits that exist at once; a part of `largest_temporary` where the loss decides it."""
    workspace: int

    @property
    def state(self) -> int:
        """What stays from step to step."""
        return self.weights + self.main_weights + self.gradients + self.moments

    @property
    def total(self) -> int:
        """What torch.cuda.max_memory_allocated will say."""
        return self.state + self.activations + self.largest_temporary + self.workspace

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"state": self.state, "total": self.total}

    def lines(self) -> Iterator[str]:
        """The plan for a terminal."""
        unit, nbytes = ("GiB", GIB) if self.total >= GIB else ("MiB", 1 << 20)
        parts = ("weights", "main_weights", "gradients", "moments", "activations", "largest_temporary", "workspace")
        for part in parts:
            yield f"{part.replace('_', ' '):<20}{getattr(self, part) / nbytes:>9.2f} {unit}"
        logits = f"{self.logits_chunk / nbytes:.2f} {unit} of logits at once"
        yield f"{'in all':<20}{self.total / nbytes:>9.2f} {unit} ({logits})"

    def sentence(self, available: int) -> str:
        """The plan on one line, with a warning where it hardly fits into so many bytes."""
        warning = f" Only {available / GIB:.2f} are free." if verdict(self, available) != "fits" else ""
        return (
            f"Planned memory: {self.total / GIB:.2f} GiB, {self.state / GIB:.2f} of them weights, gradients and "
            f"moments, {self.activations / GIB:.2f} activations, {self.largest_temporary / GIB:.2f} for a while."
            + warning
        )


def memory_plan(
    config: ModelConfig,
    shapes: Mapping[str, Sequence[int]],
    recipe: Recipe,
    products: ProductsConfig | None = None,
) -> MemoryPlan:
    """The memory of a run on one GPU.

    `shapes` are those of the decoder's parameters; `products` says who multiplies in the experts, by default who does
    on a GPU in bf16. The figure holds for the Triton kernels; see `activation_sizes`.
    """
    element = 2 if recipe.precision == "bf16" else 4
    trained = sum(prod(shape) for name, shape in shapes.items() if not _is_untrained(name))
    untrained = sum(prod(shape) for shape in shapes.values()) - trained
    shape = _shape(config, recipe, element, products)
    recompute, layers = recipe.memory.recompute, range(config.num_layers)
    each = [layer_bytes(config, layer, shape) for layer in layers]
    stream = shape.tokens * config.hidden_size * element
    held = [layer.held(recompute, 2 * stream) for layer in each]
    again = max(layer.kept for layer in each) if recompute == "full" else 0
    chunk = _logits_chunk(config, shape.tokens, element)
    # The last norm's input and output, and the gradient of its output, stand beside the logits.
    loss = 3 * stream + chunk
    spared = max(layer.spared for layer in each) if recompute == "selective" else 0
    backward = max(layer.temporary for layer in each) + again + spared
    # Offloaded, the last layer alone is there when the loss is computed; in its backward pass the next one comes back.
    at_loss, at_backward = (held[-1:], held[-2:]) if recipe.memory.offload == "activations" else (held, held)
    moments = [(sum(at_loss), loss), (sum(at_backward), backward)]
    activations, temporary = max(moments, key=sum)
    return MemoryPlan(
        weights=(trained + untrained) * element,
        main_weights=(trained + untrained) * 4 if element != 4 else 0,
        gradients=trained * 4,
        moments=trained * 2 * (2 if recipe.optimizer.moments == "bf16" else 4),
        activations=activations,
        largest_temporary=temporary,
        logits_chunk=chunk,
        workspace=WORKSPACE + (_STREAMS if products and products.matmul == "transformer_engine" else 0),
    )


def plan_run(config: ModelConfig, recipe: Recipe, device: torch.device | None = None) -> MemoryPlan:
    """The plan of a run on a GPU that need not be there; `device` is it, where it is."""
    with torch.device("meta"):
        decoder = Decoder(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in decoder.named_parameters()}
    return memory_plan(config, shapes, recipe, _products(decoder, recipe, device))


def verdict(plan: MemoryPlan, available: int) -> Literal["fits", "close", "exceeds"]:
    """Whether a run fits into so many bytes: the plan is right within 5 %."""
    if plan.total > available * 1.05:
        return "exceeds"
    return "close" if plan.total > available * 0.95 else "fits"


def _shape(config: ModelConfig, recipe: Recipe, element: int, products: ProductsConfig | None) -> Shape:
    tokens = recipe.data.micro_batch_size * recipe.data.sequence_length
    rows = tokens * config.moe_router_topk
    if recipe.moe.pad_to_capacity and recipe.moe.capacity_factor is not None and config.num_moe_experts:
        experts = config.num_moe_experts
        rows = experts * expert_capacity(tokens, config.moe_router_topk, experts, recipe.moe.capacity_factor)
    return Shape(
        tokens=tokens,
        length=recipe.data.sequence_length,
        element=element,
        rows=rows,
        rounds_expert_gradients=products is None or products.weight_gradient == "torch",
        gathers_gradient=products is not None and products.gathers_gradient,
    )


def _products(decoder: Decoder, recipe: Recipe, device: torch.device | None) -> ProductsConfig | None:
    """Who multiplies: whom the recipe names, else what a device's kind, the dtype and the matrices' shapes decide."""
    matrices = [w for name, w in decoder.named_parameters() if ".experts.experts." in name and name.endswith("weight")]
    named = recipe.kernels.products
    if not matrices or (named == "auto" and (device is None or device.type != "cuda")):
        return None
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    rows = torch.empty(1, decoder.config.hidden_size, dtype=dtype, device="meta" if device is None else device)
    return ProductsConfig.from_shape("triton", rows, *matrices[:2], products=named)


def _logits_chunk(config: ModelConfig, tokens: int, element: int) -> int:
    row = config.vocab_size * element
    chunks = max(1, -(-tokens // max(1, CHUNK_NBYTES // row)))
    return min(tokens, -(-tokens // chunks)) * row


def _is_untrained(name: str) -> bool:
    """Layers that predict further tokens are held and not trained."""
    return name.startswith("mtp.")
