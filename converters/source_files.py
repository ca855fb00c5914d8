"""The files that a conversion reads: what its result depends on, and what it must not write over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ckptbridge.converters.convert import ConversionPlan
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.model import Model
from ckptbridge.converters.tasks import leaves


def files_read(plan: ConversionPlan) -> list[Path]:
    """Every file, once, by the name under which it is read; links are not followed. Files of the Hub are not there."""
    found = {path: None for model in plan.source.opened if model.remote is None for path in _files_of(model)}
    return sorted(found)


def state_of_files(plan: ConversionPlan) -> str:
    """Sizes and times of them all: another text once one of them is written to or replaced.

    Raises BadInputError when one has gone.
    """
    lines: list[str] = []
    for path in files_read(plan):
        try:
            stat = path.stat()
        except FileNotFoundError:
            raise BadInputError(f"{path}: the file has gone since the source was opened; run again") from None
        lines.append(f"{path.name}:{stat.st_size}:{stat.st_mtime_ns}")
    return "\n".join(lines)


def _files_of(model: Model) -> Iterator[Path]:
    if model.hf_config_file is not None:
        yield model.hf_config_file
    yield from model.assets
    for tensor in model.sources.values():
        for leaf in leaves(tensor):
            yield from {extent.path for extent in leaf.extents() or () if extent.path is not None}
