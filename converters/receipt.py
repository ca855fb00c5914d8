"""What a conversion did, tensor by tensor, so that it can be checked again later."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ckptbridge import __version__
from ckptbridge.converters.errors import BadInputError

RECEIPT_NAME = "ckptbridge_receipt.json"
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

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def read_receipt(path: Path) -> Receipt:
    """A receipt from its file or the folder that holds it. Raises BadInputError when it is none."""
    file = path / RECEIPT_NAME if path.is_dir() else path
    try:
        value: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        value["notes"] = tuple(value["notes"])
        return Receipt(**value)
    except FileNotFoundError as error:
        raise BadInputError(f"{file}: the receipt is missing") from error
    except (ValueError, TypeError, KeyError) as error:
        raise BadInputError(f"{file}: no receipt of a conversion: {error}") from error
