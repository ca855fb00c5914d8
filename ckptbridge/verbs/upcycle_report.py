"""The report that an upcycle ends with: made when every tensor is written, before the folder gets its name."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from ckptbridge.trainer.upcycling.prepared import Prepared
    from ckptbridge.trainer.upcycling.report import UpcycleReport


class Reporter:
    """Compares the mixture with its source on a text; `found` is there once the conversion asked for the file."""

    def __init__(self, made: Prepared, text: Path | None, *, hidden: bool) -> None:
        """`hidden` shows no progress.

        Raises BadInputError for a text that cannot be used, NotSupportedError for a model that cannot be run.
        """
        from ckptbridge.converters.errors import NotSupportedError
        from ckptbridge.trainer.computed import COMPUTED, refuse_beyond
        from ckptbridge.trainer.text_ids import read_text, text_ids
        from ckptbridge.trainer.upcycling.report import PROBE_TOKENS

        models = (*made.sources, made.mixture)
        try:
            for model in models:
                refuse_beyond(model.config, COMPUTED, "the report")
        except NotSupportedError as error:
            raise NotSupportedError(f"{error}; --no-probe leaves the report out") from error
        words = None if text is None else read_text(text)
        self._made, self._hidden = made, hidden
        self._ids, self._described = text_ids(models, words, PROBE_TOKENS)
        self.found: UpcycleReport | None = None

    def file(self) -> bytes:
        """The report as it lies beside the weights."""
        from ckptbridge.report import layer_progress
        from ckptbridge.trainer.upcycling.report import report

        made = self._made
        with layer_progress("comparing with the source", self._hidden) as progress:
            self.found = report(made.sources, made.mixture, made.spec, self._ids, self._described, progress)
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
