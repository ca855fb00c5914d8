"""The report that an upcycle ends with: made when every tensor is written, before the folder gets its name."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch
    from torch import Tensor

    from ckptbridge.converters.model import Model
    from ckptbridge.trainer.upcycling.prepared import Prepared
    from ckptbridge.trainer.upcycling.report import UpcycleReport


@dataclass(frozen=True, slots=True)
class Probe:
    """The text that models are compared on: token ids [T], and which text they are."""

    ids_T: Tensor
    described: str


def probe_of(models: Sequence[Model], text: Path | None) -> Probe:
    """The first tokens of a text file, or of the text that comes with the program; no tensor is read.

    Raises BadInputError for a text that cannot be used, NotSupportedError for a model that cannot be run.
    """
    from ckptbridge.converters.errors import NotSupportedError
    from ckptbridge.trainer.computed import COMPUTED, refuse_beyond
    from ckptbridge.trainer.text_ids import read_text, text_ids
    from ckptbridge.trainer.upcycling.report import PROBE_TOKENS

    try:
        for model in models:
            refuse_beyond(model.config, COMPUTED, "the report")
    except NotSupportedError as error:
        raise NotSupportedError(f"{error}; --no-probe leaves the report out") from error
    return Probe(*text_ids(models, None if text is None else read_text(text), PROBE_TOKENS))


class Reporter:
    """Compares the mixture, as it is written, with its source; `found` is there once the conversion asked for it."""

    def __init__(self, made: Prepared, probe: Probe, dtype: torch.dtype | None, *, hidden: bool) -> None:
        """`dtype` is what the mixture's weights are written in, None each one's own; `hidden` shows no progress."""
        from ckptbridge.trainer.upcycling.rounding import as_written

        self._made, self._probe, self._hidden = replace(made, mixture=as_written(made.mixture, dtype)), probe, hidden
        self.found: UpcycleReport | None = None

    def file(self) -> bytes:
        """The report as it lies beside the weights."""
        from ckptbridge.report import layer_progress
        from ckptbridge.trainer.upcycling.report import report

        made, probe = self._made, self._probe
        with layer_progress("comparing with the source", self._hidden) as progress:
            self.found = report(made.sources, made.mixture, made.spec, probe.ids_T, probe.described, progress)
        return (json.dumps(self.to_json(), indent=2) + "\n").encode()

    def to_json(self) -> dict[str, Any]:
        """What was found, for machines; empty as long as nothing was."""
        if self.found is None:
            return {}
        distilled = [asdict(layer) for layer in self._made.distilled]
        return {**self.found.to_json(), **({"distilled": distilled} if distilled else {})}

    def lines(self) -> list[str]:
        """What was found, for people."""
        from ckptbridge.trainer.upcycling.report_lines import lines

        if self.found is None:
            return []
        trained = [
            f"layer {layer.layer}: distilled from {layer.before:.2%} to {layer.after:.2%} of its output"
            for layer in self._made.distilled
        ]
        return [*trained, *lines(self.found)]

    @property
    def failed(self) -> bool:
        """Whether the mixture is not what it was meant to be."""
        return self.found is not None and not self.found.passed
