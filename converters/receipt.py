"""What a conversion did, tensor by tensor, so that it can be checked again later."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ckptbridge import __version__
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.small_files import read_small

RECEIPT_NAME = "ckptbridge_receipt.json"
_MOST_NBYTES = 1 << 30
MAPPING_VERSION = 1
"""Raised whenever a table or layout changes what is written for the same input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Digests are XXH3-64 of a tensor's bytes. Tensors of torch_dist are chunks, named key@offsets."""

    tool_version: str = __version__
    mapping_version: int = MAPPING_VERSION
    source: str
    source_format: str
    target_format: str
    family: str
    notes: tuple[str, ...]
    source_tensors: dict[str, str]
    target_tensors: dict[str, str]
    source_nbytes: int
    target_nbytes: int
    files: dict[str, int]
    not_finite: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    """How many NaN ("nan") and infinities ("infinite") each source tensor holds that has any, and how many finite
    numbers of it the written dtype makes infinite ("overflowed")."""
    plan: str = ""
    """A digest of what was to be written from what, by which a run that is started again knows that all is done."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def read_receipt(path: Path) -> Receipt:
    """A receipt from its file or the folder that holds it. Raises BadInputError when it is none."""
    file = path / RECEIPT_NAME if path.is_dir() else path
    raw = read_small(file, _MOST_NBYTES)
    try:
        value: dict[str, Any] = json.loads(raw.decode("utf-8"))
        value["notes"] = tuple(value["notes"])
        receipt = Receipt(**value)
        Path(receipt.source).resolve()
    except (ValueError, TypeError, KeyError, OSError, RecursionError) as error:
        raise BadInputError(f"{file}: no receipt of a conversion: {error}") from error
    for name in ("source_tensors", "target_tensors", "files", "not_finite"):
        if not isinstance(getattr(receipt, name), dict):
            raise BadInputError(f"{file}: no receipt of a conversion: {name} is no object")
    return receipt
