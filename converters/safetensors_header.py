"""The header of a safetensors file: read and checked before any of its bytes is trusted, written before any is there.

Format: 8 bytes little-endian header length, JSON header {name: {dtype, shape, data_offsets}}, data
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from ckptbridge.converters.errors import BadInputError, NotSupportedError, StorageError, told
from ckptbridge.converters.tensors import LazyTensor, Stored

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MOST_AXES, _LARGEST = 64, 1 << 62
_MAX_HEADER = 100_000_000
"""The same bound as the safetensors library's, so that a hostile length cannot take the memory."""


def read_header(path: Path) -> dict[str, Stored]:
    """Every tensor of one file, by header only.

    Raises BadInputError naming the file and the tensor when the header is longer than the file, is not JSON,
    names a tensor twice, or when offsets leave gaps, overlap, or reach past the end of the file.
    """
    try:
        if path.exists() and not path.is_file():
            raise BadInputError(f"{path}: is no plain file")
        size = path.stat().st_size
        with path.open("rb") as file:
            raw = file.read(header_nbytes(path, file.read(8), size))
    except FileNotFoundError as error:
        raise BadInputError(f"{path}: the file is missing") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from error
    return parse_header(path, raw, size)


def header_nbytes(path: Path, head: bytes, size: int) -> int:
    """The length of the JSON behind `head`, the first 8 bytes of a file of `size` bytes. Raises BadInputError."""
    if size == 0:
        raise BadInputError(f"{path}: the file is empty: it was truncated to 0 bytes; copy or download it again")
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > min(size - 8, _MAX_HEADER):
        raise BadInputError(
            f"{path}: the header says it is {length} bytes long, but the file has {size}: "
            "it is truncated or no safetensors file"
        )
    return length


def parse_header(path: Path, raw: bytes, size: int) -> dict[str, Stored]:
    """The tensors of a file of `size` bytes by the JSON of its header; see `read_header`. `path` need not be there."""
    try:
        header: Any = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{path}: the header cannot be read: {error}") from error
    if not isinstance(header, dict):
        raise BadInputError(f"{path}: the header is no JSON object")
    entries: dict[str, Any] = header  # pyright: ignore[reportUnknownVariableType]
    entries.pop("__metadata__", None)
    return _checked(path, entries, 8 + len(raw), size)


def _checked(path: Path, entries: dict[str, Any], data_start: int, size: int) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        where = f"{path}: tensor {name!r}"
        try:
            kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (TypeError, KeyError, ValueError) as error:
            raise BadInputError(f"{where}: its entry lacks dtype, shape or data_offsets") from error
        if len(shape) > _MOST_AXES or not all(type(n) is int and 0 <= n < _LARGEST for n in (*shape, begin, end)):
            raise BadInputError(
                f"{where}: shape {told(list(shape))} and offsets {told([begin, end])} must be whole numbers from 0"
            )
        if not isinstance(kind, str) or kind not in DTYPES:
            raise NotSupportedError(f"{where}: dtype {told(kind)} is not known; known are {', '.join(DTYPES)}")
        dtype = DTYPES[kind]
        if end - begin != prod(shape) * dtype.itemsize:
            raise BadInputError(
                f"{where}: shape {list(shape)} of {kind} takes {prod(shape) * dtype.itemsize} bytes, its "
                f"offsets span {end - begin}"
            )
        if data_start + end > size:
            raise BadInputError(
                f"{where}: its bytes end at {data_start + end}, the file at {size}: the file is truncated; "
                "copy or download it again"
            )
        ranges.append((begin, end, name))
        found[name] = Stored(path, data_start + begin, shape, dtype)
    at = 0
    for begin, end, name in sorted(ranges):
        if begin != at:
            raise BadInputError(
                f"{path}: tensor {name!r}: its bytes begin at {begin}, but the ones before end at {at}: "
                "tensors overlap or leave a gap"
            )
        at = end
    if data_start + at != size:
        raise BadInputError(f"{path}: {size - data_start - at} bytes behind the last tensor belong to none")
    return found


def make_header(tensors: Mapping[str, LazyTensor]) -> tuple[bytes, dict[str, int]]:
    """The bytes that open a file of these tensors, in this order, and where in the file each tensor begins."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    for name, tensor in tensors.items():
        offsets[name] = end
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + at for name, at in offsets.items()}


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"the name {key!r} appears twice")
        made[key] = value
    return made
