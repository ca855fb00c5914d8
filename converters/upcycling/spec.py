"""How to upcycle: what a person chooses, before any model is looked at.

Notation of He et al. 2024 (arXiv 2410.07524): granularity G = dense width / expert width, N experts are E = N / G
groups, each a whole copy of the dense MLP, T is top-k and k = T / G the groups that a token meets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

from ckptbridge.converters.errors import BadInputError

Method = Literal[
    "copy",
    "virtual-group",
    "drop",
    "split",
    "cmoe",
    "branch-train-mix",
    "expert-upcycling",
    "prune",
    "merge",
]
DENSE_METHODS: tuple[Method, ...] = ("copy", "virtual-group", "drop", "split", "cmoe", "branch-train-mix")
"""From dense models."""
MIXTURE_METHODS: tuple[Method, ...] = ("expert-upcycling", "prune", "merge")
"""From mixtures, which stay what they are but for the number of experts."""
PARTITIONS: tuple[Method, ...] = ("split", "cmoe")
"""Every neuron is in one expert: one group, E = 1."""
Scaling = Literal["exact", "paper", "down", "none"]
RouterKind = Literal["renormalised", "pre-softmax", "sigmoid"]
RouterInit = Literal["random", "hidden-state", "neurons", "fitted"]
Shared = Literal["none", "partition", "overlap"]
Split = Literal["contiguous", "random", "clustering"]
DropMask = Literal["shared", "per-matrix"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpcycleSpec:
    """How to upcycle. `num_experts` is N, `topk` T, `granularity` G of the module's notation."""

    num_experts: int
    topk: int | None = None
    """None: 2 from dense models; from mixtures what the method makes of theirs. `chosen` is the number."""
    granularity: int = 1
    method: Method | None = None
    """None: copy for granularity 1, virtual-group above."""
    to: str | None = None
    """The family of the result. None and mcore take the one that fits the source, hf one that transformers has."""
    scaling: Scaling = "exact"
    """Where the factor stands that makes the experts' weighted sum the dense output. `paper` is the published cube
    root on every matrix, `down` the whole factor on down_proj, `none` leaves it out."""
    router: RouterKind = "renormalised"
    """The chosen experts' weights sum to one; or softmax over all experts, as they are; or sigmoids that are divided
    by their sum."""
    router_groups: bool = False
    """Sigmoid: choose k whole groups first, then their experts (DeepSeek's group-limited routing)."""
    router_init: RouterInit | None = None
    """Rows drawn at random; the mean input of prompts (one set a group); of a partition the gate_proj rows of each
    expert's representative neuron, or those that predict best how much it adds. None: fitted for methods that cluster
    neurons (cmoe, split clustering), random for the others."""
    router_std: float | None = None
    """Standard deviation of the router's rows; None takes the model's own, or a wider one for virtual groups."""
    router_noise: float = 0.0
    """Standard deviation of what is added to each expert's row, so that the rows of a group part."""
    shared: Shared = "none"
    """A shared expert: `partition` takes `shared_width` neurons away from the routed ones, `overlap` is the whole MLP
    times `shared_weight`, the routed experts times the rest."""
    shared_width: int | None = None
    """Neurons; None is half of the dense width, a quarter for cmoe."""
    shared_weight: float = 0.5
    layers: str = "all"
    """Which layers become mixtures: all, numbers (0,2,5), ranges (4-31), or a slice (3: or 1::2)."""
    permute: bool = False
    """Each group cuts its shards from an order of neurons of its own."""
    noise: float = 0.0
    """Gaussian noise on every expert's matrices, as a share of the matrix's root mean square."""
    drop_ratio: float = 0.5
    """Drop-Upcycling: the share of an expert's neurons that is drawn anew."""
    drop_mask: DropMask = "shared"
    """`shared`: the same neurons in all three matrices (the paper). `per-matrix`: others in each (its code)."""
    split: Split = "contiguous"
    """Which neurons go together into an expert (method split)."""
    seed: int = 0
    allow_inexact: bool = False
    """Do what cannot work as meant, and say so, instead of refusing it."""

    def resolved(self) -> Self:
        """The same with the method named, and the granularity that a partition implies.

        Raises BadInputError for a partition with another granularity.
        """
        method = self.method or ("copy" if self.granularity == 1 else "virtual-group")
        if method in PARTITIONS and self.granularity not in (1, self.num_experts):
            raise BadInputError(
                f"granularity is {self.granularity}, which method {method} does not use: it divides the MLP by "
                f"num_experts {self.num_experts}; leave granularity out"
            )
        granularity = self.num_experts if method in PARTITIONS else self.granularity
        shared: Shared = "partition" if method == "cmoe" and self.shared == "none" else self.shared
        topk = self.chosen if method in DENSE_METHODS else self.topk
        init = self.router_init or ("fitted" if self.clusters_neurons else "random")
        return replace(self, method=method, topk=topk, granularity=granularity, shared=shared, router_init=init)

    @property
    def chosen(self) -> int:
        """T of a resolved spec for dense models: how many experts a token meets."""
        return 2 if self.topk is None else self.topk

    @property
    def clusters_neurons(self) -> bool:
        """Whether activations decide which neurons go together."""
        return self.method == "cmoe" or (self.method == "split" and self.split == "clustering")

    @property
    def groups(self) -> int:
        """E: how many whole copies of the dense MLP the experts are."""
        return self.num_experts // self.granularity

    def shared_neurons(self, ffn_hidden_size: int) -> int:
        """How many neurons the shared expert takes away from the routed ones."""
        if self.shared != "partition":
            return 0
        if self.shared_width is not None:
            return self.shared_width
        return ffn_hidden_size // (4 if self.method == "cmoe" else 2)

    def expert_width(self, ffn_hidden_size: int) -> int:
        """The width of one routed expert."""
        return (ffn_hidden_size - self.shared_neurons(ffn_hidden_size)) // self.granularity
