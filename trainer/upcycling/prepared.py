"""From a recipe's words to the mixture: what has to be opened, measured and trained before it can be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.hub.source import local_folder
from ckptbridge.converters.model import Model, open_model
from ckptbridge.converters.upcycling.construction import upcycled
from ckptbridge.converters.upcycling.spec import UpcycleSpec
from ckptbridge.trainer.upcycle_recipe import UpcycleSection
from ckptbridge.trainer.upcycling.distillation import DistilledLayer, distilled
from ckptbridge.trainer.upcycling.measure import measure_files
from ckptbridge.trainer.upcycling.streaming import OnProgress


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A mixture that nothing of was written, but for the layers that distillation trained."""

    mixture: Model
    sources: tuple[Model, ...]
    """What it was made of: several for branch-train-mix."""
    spec: UpcycleSpec
    distilled: tuple[DistilledLayer, ...] = ()


def prepared(
    source: Model, section: UpcycleSection, work: Path | None, on_progress: OnProgress | None = None
) -> Prepared:
    """The mixture that a section asks for, as a view over the source.

    A method that looks at activations runs the source on its text first, layer by layer. Distillation keeps its layers
    in `work`; with None it is left out, and the mixture is that from which it would begin. `on_progress` is called with
    layers done and all layers, whenever the source is run.
    Raises BadInputError, NotSupportedError or StorageError for what cannot be done.
    """
    _check_files(section)
    spec = section.spec()
    others = [open_model(local_folder(str(path.expanduser()))) for path in section.others]
    measured = measure_files(source, spec, section.calibrate, section.prompts, others=others, on_progress=on_progress)
    mixture = upcycled(source, spec, measured, others)
    sources = (source, *others)
    if section.distill is None or work is None:
        return Prepared(mixture=mixture, sources=sources, spec=spec)
    if others:
        raise BadInputError("distill: the mixture of several models has no one MLP to learn from; leave distill out")
    model, told = distilled(
        source, mixture, section.distill, work, seed=section.seed, text=section.calibrate, on_progress=on_progress
    )
    return Prepared(mixture=model, sources=sources, spec=spec, distilled=tuple(told))


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
