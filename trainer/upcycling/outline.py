"""What an upcycle will make, as far as headers tell: enough to refuse it before anything is run or trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.hub.source import local_folder
from ckptbridge.converters.model import Model, open_model
from ckptbridge.converters.tensors import Zeros
from ckptbridge.converters.upcycling.branch_train_mix import averaged, check_number
from ckptbridge.converters.upcycling.mixtures import changed_config
from ckptbridge.converters.upcycling.semantics import check
from ckptbridge.converters.upcycling.spec import MIXTURE_METHODS, UpcycleSpec
from ckptbridge.converters.upcycling.targets import choose_target, hf_config_of
from ckptbridge.trainer.upcycle_recipe import UpcycleSection


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """A mixture before it is prepared."""

    sources: tuple[Model, ...]
    """What it is made of: several for branch-train-mix."""
    spec: UpcycleSpec
    mixture: Model
    """Its class, config, names and shapes; every tensor is zeros."""


def outlined(source: Model, section: UpcycleSection) -> Outline:
    """Open what a section names and say what comes of it; nothing but headers is read.

    Raises BadInputError or NotSupportedError for what cannot be built, whatever a text would show.
    """
    _check_files(section)
    others = [open_model(local_folder(str(path.expanduser()))) for path in section.others]
    spec, sources = section.spec(), (source, *others)
    resolved = spec.resolved()
    check(resolved, source.config)
    check_number(resolved, len(sources))
    if others and section.distill is not None:
        raise BadInputError("distill: the mixture of several models has no one MLP to learn from; leave distill out")
    return Outline(sources=sources, spec=spec, mixture=_shapes(averaged(sources) if others else source, resolved))


def _shapes(source: Model, spec: UpcycleSpec) -> Model:
    """The mixture of a resolved and checked spec with zeros for tensors."""
    if spec.method in MIXTURE_METHODS:
        family, config = source.family, changed_config(source, spec)
    else:
        family, config, _ = choose_target(source, spec)
    return replace(
        source,
        family=family,
        config=config,
        tensors={move.name: Zeros(move.shape, source.dtype) for move in family.moves(config)},
        hf_config=hf_config_of(source, family, config),
        hf_config_file=None,
        made_of=source.opened,
        saved=None,
    )


def _check_files(section: UpcycleSection) -> None:
    named: Sequence[tuple[str, Path | None]] = (
        ("calibrate", section.calibrate),
        ("prompts", section.prompts),
        ("probe", section.probe),
        ("distill.text", section.distill.text if section.distill else None),
    )
    for name, path in named:
        if path is not None and not path.is_file():
            raise BadInputError(f"{path}: no such text file ({name})")
