"""Branch-train-mix (arXiv 2403.07816): dense models that were trained apart from one seed become one mixture.

The experts are the models' own MLPs; whatever a mixture holds once (attention, norms, embeddings, MLPs of layers that
stay dense) is the mean of all models'. The router is new, and has to be trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

from ckptbridge.converters.errors import BadInputError, NotSupportedError, told
from ckptbridge.converters.model import Model
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.upcycling.blended import blended
from ckptbridge.converters.upcycling.spec import UpcycleSpec


def averaged(models: Sequence[Model]) -> Model:
    """The dense model whose every tensor is the mean of the models' tensors of that name; nothing is read.

    Its sources are all models' tensors, each name behind its model's number: 0/model.norm.weight. Tokenizer and
    config.json are the first model's.
    Raises BadInputError, naming the field or the tensor and both folders, for models that are not alike.
    """
    first = models[0]
    for model in models:
        _check_alike(first, model)
    return replace(
        first,
        tensors={name: blended([model.tensors[name] for model in models]) for name in first.tensors},
        sources={f"{i}/{name}": tensor for i, model in enumerate(models) for name, tensor in model.sources.items()},
        made_of=tuple(models),
        saved=None,
        notes=tuple(_notes(models)),
        derivation=f"mean of {[str(model.path) for model in models]}",
    )


def check_number(spec: UpcycleSpec, models: int) -> None:
    """Whether a resolved spec has a group of experts for each model. Raises BadInputError."""
    if spec.method != "branch-train-mix":
        if models > 1:
            raise BadInputError(f"method {spec.method} takes one model, but {models} were given")
        return
    if models < 2:
        raise BadInputError("branch-train-mix mixes two models or more: name the others beside the source")
    if spec.groups != models:
        groups = "" if spec.granularity == 1 else f" in groups of {spec.granularity}"
        raise BadInputError(
            f"num_experts is {spec.num_experts}{groups}, but there are {models} models: each becomes one "
            f"{'group' if groups else 'expert'}, so use --num-experts {models * spec.granularity}"
        )


def _check_alike(first: Model, model: Model) -> None:
    if model.remote is not None:
        raise NotSupportedError(f"{model.path}: branch-train-mix needs all models on disk; download it first")
    if model.beside:
        raise NotSupportedError(f"{model.path}: branch-train-mix does not take tensors that are passed through")
    if model.family.name != first.family.name:
        raise _unlike("the architecture", first, first.family.architecture, model, model.family.architecture)
    for field in fields(ModelConfig):
        one, other = getattr(first.config, field.name), getattr(model.config, field.name)
        if one != other:
            raise _unlike(field.name, first, told(one), model, told(other))
    for name, tensor in first.tensors.items():
        if model.tensors[name].dtype != tensor.dtype:
            raise _unlike(f"the dtype of {name}", first, str(tensor.dtype), model, str(model.tensors[name].dtype))


def _unlike(what: str, first: Model, one: str, model: Model, other: str) -> BadInputError:
    return BadInputError(
        f"{model.path}: {what} is {other}, but {one} in {first.path}; branch-train-mix takes models of one seed, "
        "alike in everything but their weights"
    )


def _notes(models: Sequence[Model]) -> list[str]:
    notes = [note for model in models for note in model.notes]
    notes += [f"experts of model {number}: {model.path}" for number, model in enumerate(models)]
    held = [{path.name: path for path in model.assets} for model in models]
    for number, assets in enumerate(held[1:], 1):
        name = "tokenizer.json"
        if name in assets and name in held[0] and assets[name].read_bytes() != held[0][name].read_bytes():
            notes.append(
                f"{assets[name]} differs from {held[0][name]}: if tokens have other numbers, the averaged embedding "
                f"means nothing; the result has the first model's. Compare it before you train model {number}'s expert"
            )
    return notes
