"""From a recipe's words to the mixture: what has to be opened, measured and trained before it can be read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ckptbridge.converters.model import Model
from ckptbridge.converters.upcycling.construction import upcycled
from ckptbridge.converters.upcycling.spec import UpcycleSpec
from ckptbridge.trainer.upcycle_recipe import UpcycleSection
from ckptbridge.trainer.upcycling.distillation import distillation_text, distilled
from ckptbridge.trainer.upcycling.measure import measure_files
from ckptbridge.trainer.upcycling.outline import Outline, outlined
from ckptbridge.trainer.upcycling.scratch import DistilledLayer
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
    return prepared_of(outlined(source, section), section, work, on_progress)


def prepared_of(
    outline: Outline, section: UpcycleSection, work: Path | None, on_progress: OnProgress | None = None
) -> Prepared:
    """The same of the outline that the section was given; texts are read before anything is run."""
    (source, *others), spec = outline.sources, outline.spec
    distill = None if work is None else section.distill
    text = None if distill is None else distillation_text(source, distill, section.calibrate)
    measured = measure_files(source, spec, section.calibrate, section.prompts, others=others, on_progress=on_progress)
    mixture = upcycled(source, spec, measured, others)
    if distill is None or work is None:
        return Prepared(mixture=mixture, sources=outline.sources, spec=spec)
    model, told = distilled(source, mixture, distill, work, seed=section.seed, text=text, on_progress=on_progress)
    return Prepared(mixture=model, sources=outline.sources, spec=spec, distilled=tuple(told))
