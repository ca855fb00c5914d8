"""A mixture from a mixture, as a view: more experts, or fewer; everything else stays as it is.

Each new expert is an old one, or several with a weight each; its row of the router (and its biases there) likewise.
Shapes: N experts of the source, T its top-k, m = new experts / N.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.fields import write_config
from ckptbridge.converters.mcore.keys import layer_of
from ckptbridge.converters.model import Model
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.tensors import LazyTensor, join_rows, rows
from ckptbridge.converters.upcycling.blended import blended
from ckptbridge.converters.upcycling.drawn import generator_for
from ckptbridge.converters.upcycling.measured import LayerMeasurement, Measured
from ckptbridge.converters.upcycling.mixture_semantics import default_topk
from ckptbridge.converters.upcycling.spec import UpcycleSpec
from ckptbridge.converters.upcycling.targets import hf_config_of

Recipe = Sequence[Sequence[tuple[int, float]]]
"""For each new expert the old ones that it is made of, each with its weight."""
_EXPERT = re.compile(r"(.+\.mlp)\.experts\.experts\.(\d+)\.(.+)")
_ROUTER = re.compile(r"(.+\.mlp)\.router\.(weight|bias|expert_bias)")


def changed_mixture(source: Model, spec: UpcycleSpec, measured: Measured, derivation: str) -> Model:
    """The source with the number of experts that a resolved and checked spec says; nothing is read yet.

    Raises BadInputError when a measurement is missing, NotSupportedError when the class cannot say the result.
    """
    config = changed_config(source, spec)
    old = source.config
    notes = [
        f"{spec.method}: {old.num_moe_experts} experts with top-k {old.moe_router_topk} become "
        f"{config.num_moe_experts} with top-k {config.moe_router_topk}"
    ]
    if spec.method == "expert-upcycling" and not spec.router_noise:
        notes.append(
            "copies of an expert are equal, and so are their rows of the router: where a token meets all of them they "
            "get equal gradients and stay equal. --router-noise parts them, at the cost of a small difference now"
        )
    return replace(
        source,
        config=config,
        tensors=changed_tensors(source, spec, measured),
        hf_config=hf_config_of(source, source.family, config),
        hf_config_file=None,
        notes=(*source.notes, *notes),
        derivation=derivation,
        made_of=source.opened,
        saved=None,
    )


def changed_config(source: Model, spec: UpcycleSpec) -> ModelConfig:
    """The config of the mixture that a resolved spec makes of a source's.

    Raises NotSupportedError when the source's class cannot say it, or another class is asked for.
    """
    old = source.config
    if spec.to not in (None, source.family.name):
        raise NotSupportedError(
            f"--to {spec.to}: method {spec.method} keeps the source's class, which is {source.family.architecture}"
        )
    new = replace(old, num_moe_experts=spec.num_experts, moe_router_topk=default_topk(spec, old), **_routing(spec, old))
    try:
        write_config(source.family.fields, new)
    except (NotSupportedError, BadInputError) as error:
        raise NotSupportedError(
            f"{source.path}: {source.family.architecture} cannot say the result: {error}"
        ) from error
    return new


def _routing(spec: UpcycleSpec, old: ModelConfig) -> dict[str, int | float | None]:
    """Groups and scaling factor, where they change: all copies of the best groups have to be chosen together.

    Sigmoids that are not divided by their sum do not become smaller when there are more of them: the scaling factor
    does. Softmax over all experts gives each copy its share.
    """
    if spec.method != "expert-upcycling" or spec.num_experts % (old.num_moe_experts or 1):
        return {}
    copies = spec.num_experts // (old.num_moe_experts or 1)
    if spec.router_groups:
        return {"moe_router_num_groups": copies, "moe_router_group_topk": 1}
    changed: dict[str, int | float | None] = {}
    if old.moe_router_num_groups is not None:
        changed["moe_router_num_groups"] = copies * old.moe_router_num_groups
        changed["moe_router_group_topk"] = copies * (old.moe_router_group_topk or 1)
    if old.moe_router_score_function == "sigmoid" and old.moe_router_pre_softmax:
        factor = (old.moe_router_topk_scaling_factor or 1.0) / copies
        changed["moe_router_topk_scaling_factor"] = None if factor == 1 else factor
    return changed


def changed_tensors(source: Model, spec: UpcycleSpec, measured: Measured) -> dict[str, LazyTensor]:
    """The tensors of the new mixture; nothing is read.

    Raises BadInputError naming the layer when the method needs a measurement that is missing or of another model.
    """
    made: dict[str, LazyTensor] = {}
    recipes: dict[str, Recipe] = {}
    for name, tensor in source.tensors.items():
        if found := _EXPERT.fullmatch(name):
            head, tail = found[1], found[3]
            if found[2] != "0":
                continue
            old = [f"{head}.experts.experts.{i}.{tail}" for i in range(source.config.num_moe_experts or 0)]
            for number, parts in enumerate(_recipe(head, spec, source.config, measured, recipes)):
                made[f"{head}.experts.experts.{number}.{tail}"] = blended(
                    [source.tensors[old[expert]] for expert, _ in parts], [weight for _, weight in parts]
                )
        elif found := _ROUTER.fullmatch(name):
            recipe = _recipe(found[1], spec, source.config, measured, recipes)
            made[name] = _with_noise(_router(tensor, recipe), name, spec)
        else:
            made[name] = tensor
    return made


def _router(tensor: LazyTensor, recipe: Recipe) -> LazyTensor:
    return join_rows(
        [blended([rows(tensor, i, i + 1) for i, _ in parts], [weight for _, weight in parts]) for parts in recipe]
    )


def _with_noise(router: LazyTensor, name: str, spec: UpcycleSpec) -> LazyTensor:
    if not spec.router_noise or not name.endswith(".weight"):
        return router
    return NoisyRows(router, (spec.seed, "router noise", name), spec.router_noise)


class NoisyRows(LazyTensor):
    """A matrix with Gaussian noise of standard deviation `std`, drawn row by row: the same in whatever pieces."""

    def __init__(self, base: LazyTensor, names: tuple[int, str, str], std: float) -> None:
        self.base, self.names, self.std, self.shape, self.dtype = base, names, std, base.shape, base.dtype

    def bases(self) -> Sequence[LazyTensor]:
        return (self.base,)

    def read_rows(self, start: int, stop: int) -> Tensor:
        seed, *names = self.names
        noise = [torch.randn(self.shape[1:], generator=generator_for(seed, *names, i)) for i in range(start, stop)]
        return (self.base.read_rows(start, stop).float() + torch.stack(noise) * self.std).to(self.dtype)

    @property
    def work_row_nbytes(self) -> int:
        return self.base.work_row_nbytes + self.row_nbytes + 3 * 4 * self.shape[1]


def _recipe(head: str, spec: UpcycleSpec, old: ModelConfig, measured: Measured, known: dict[str, Recipe]) -> Recipe:
    if head not in known:
        known[head] = recipe_of(spec, old, head, measured.get(layer_of(head) or 0))
    return known[head]


def recipe_of(spec: UpcycleSpec, old: ModelConfig, where: str, measured: LayerMeasurement | None) -> Recipe:
    """What the experts of one layer are made of.

    Whole numbers of copies lie copy by copy: all experts, then all of them again, so that each copy of the old groups
    is a group. Raises BadInputError when the layer's measurement is missing or does not fit.
    """
    n, experts = spec.num_experts, old.num_moe_experts or 0
    if spec.method == "expert-upcycling" and n % experts == 0:
        return [[(number % experts, 1.0)] for number in range(n)]
    order = None if measured is None else measured.order
    if order is None:
        raise BadInputError(f"{where}: method {spec.method} decides by load: give a text with --calibrate FILE")
    numbers = [int(number) for number in order]
    is_merge = spec.method == "merge"
    if len(numbers) != (experts if is_merge else n) or not set(numbers) <= set(range(n if is_merge else experts)):
        raise BadInputError(
            f"{where}: the measurement is of another model: its order is {numbers[:8]}... of {len(numbers)}, for "
            f"{experts} experts that become {n}"
        )
    if not is_merge:
        return [[(number, 1.0)] for number in numbers]
    weights = torch.ones(experts) if measured is None or measured.weights is None else measured.weights
    groups: list[list[tuple[int, float]]] = [[] for _ in range(n)]
    for expert, group in enumerate(numbers):
        groups[group].append((expert, float(weights[expert])))
    if not all(groups) or min(float(weight) for weight in weights) < 0:
        raise BadInputError(f"{where}: the measurement leaves a group of experts empty, or weighs some less than 0")
    return [group if any(weight for _, weight in group) else [(i, 1.0) for i, _ in group] for group in groups]
