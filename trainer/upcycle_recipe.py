"""How to upcycle, as a recipe says it: the keys of `model.upcycle`, and of `ckptbridge upcycle --recipe FILE`."""

from __future__ import annotations

from dataclasses import fields

from pydantic import Field

from ckptbridge.converters.upcycling.spec import (
    DropMask,
    Method,
    RouterInit,
    RouterKind,
    Scaling,
    Shared,
    Split,
    UpcycleSpec,
)
from ckptbridge.trainer.section import AnyPath, PositiveFloat, PositiveInt, Section

MCORE = "mcore"
"""A target that names a format, not a class: a Megatron-Core checkpoint of the class that fits."""


class DistillSection(Section):
    """Layer-wise distillation: each mixture is trained to give what the dense MLP in its place gave."""

    text: AnyPath | None = None
    """A text file; by default that of `calibrate`, and without one a text that comes with the program."""
    tokens: PositiveInt
    """How many tokens each layer is trained on; a shorter text begins anew."""
    lr: PositiveFloat = 3e-3
    """The highest learning rate; it falls to zero along half a cosine."""
    batch: PositiveInt = 512
    """Tokens per update of a layer's weights."""


class UpcycleSection(Section):
    """A dense model (or, for some methods, a mixture) made into a mixture of experts."""

    num_experts: PositiveInt
    """Experts of each layer."""
    topk: PositiveInt | None = None
    """Experts that a token meets: 2 by default; from mixtures what the method makes of theirs."""
    granularity: PositiveInt = 1
    """Each expert has 1/granularity of the dense width."""
    method: Method | None = None
    """By default copy for granularity 1, virtual-group above."""
    to: str | None = None
    """The class of the result, such as mixtral or glm4_moe; by default the one that fits the source. `ckptbridge
    upcycle` takes mcore too, for a Megatron-Core checkpoint."""
    scaling: Scaling = "exact"
    """Where the factor stands that keeps the function; `paper`, `down` and `none` are there for comparison."""
    router: RouterKind = "renormalised"
    """How the chosen experts are weighed."""
    router_groups: bool = False
    """Sigmoid: choose whole groups first, then their experts."""
    router_init: RouterInit | None = None
    """The router's rows: drawn, the mean input of `prompts`, or of a partition the rows of representative neurons or
    those that predict best what each expert adds. By default fitted where neurons are clustered, otherwise
    random."""
    router_std: float | None = Field(default=None, ge=0)
    """Standard deviation of the router's rows; by default the model's own, or a wider one for virtual groups."""
    router_noise: float = Field(default=0.0, ge=0)
    """Standard deviation of what is added to each expert's row, so that the rows of a group part."""
    shared: Shared = "none"
    """A shared expert: part of the neurons, or the whole MLP besides the routed experts."""
    shared_width: int | None = Field(default=None, ge=0)
    """Its neurons; by default half of the dense width, a quarter for cmoe."""
    shared_weight: float = Field(default=0.5, ge=0, le=1)
    """Of an overlapping shared expert: its share of the output."""
    layers: str = "all"
    """Which layers become mixtures: all, numbers (0,2,5), ranges (4-31), or a slice (3: or 1::2)."""
    permute: bool = False
    """Each group cuts its shards from an order of neurons of its own."""
    noise: float = Field(default=0.0, ge=0)
    """Gaussian noise on the experts, as a share of each matrix's root mean square."""
    drop_ratio: float = Field(default=0.5, ge=0, le=1)
    """Drop-Upcycling: the share of an expert's neurons that is drawn anew."""
    drop_mask: DropMask = "shared"
    """The same neurons in all three matrices, or others in each."""
    split: Split = "contiguous"
    """Which neurons go together into an expert (method split)."""
    seed: int = 0
    """Of everything that is drawn."""
    allow_inexact: bool = False
    """Do what cannot work as meant, and say so, instead of refusing it."""
    calibrate: AnyPath | None = None
    """A text file, for methods that look at activations."""
    prompts: AnyPath | None = None
    """Prompts by which experts are told apart (router_init hidden-state)."""
    probe: AnyPath | None = None
    """The text that the result is compared with the dense model on; by default one that comes with the program."""
    report: bool = True
    """Compare the result with the dense model before it gets its name, and write what was found beside it."""
    others: list[AnyPath] = Field(default_factory=list)
    """branch-train-mix: the other models, in the order of their experts; the first is the source itself."""
    distill: DistillSection | None = None
    """Train each mixture to give what the dense MLP gave; without it nothing is trained."""

    def spec(self) -> UpcycleSpec:
        """The options that the converters know."""
        named = {field.name: getattr(self, field.name) for field in fields(UpcycleSpec)}
        return UpcycleSpec(**named | {"to": None if self.to == MCORE else self.to})
