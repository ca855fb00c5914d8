"""Small files that are read whole: config.json, an index, a tracker; but no device, no pipe, nothing far too large."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from ckptbridge.converters.errors import BadInputError, StorageError

MOST_NBYTES = 1 << 28
"""The index of a model of a hundred thousand tensors has 10 MB."""
_LONGEST_NAME = 255


def read_small(path: Path, most_nbytes: int = MOST_NBYTES) -> bytes:
    """The bytes of a file.

    Raises BadInputError when it is missing, is a folder, a device or a pipe, or has more than `most_nbytes`;
    StorageError when it cannot be read.
    """
    try:
        if not path.is_file():
            there = path.is_symlink() or path.exists()
            raise BadInputError(f"{path}: {'is no plain file' if there else 'the file is missing'}")
        if (size := path.stat().st_size) > most_nbytes:
            raise BadInputError(f"{path}: has {size} bytes, expected at most {most_nbytes}")
        with path.open("rb") as file:
            return file.read(most_nbytes)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from error


def is_file_name(name: Any) -> bool:
    """Whether a value found in a file is the name of a file within the same folder."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and PurePosixPath(name).name == name
        and not {"\\", "\0"} & set(name)
        and len(name.encode(errors="replace")) <= _LONGEST_NAME
    )
