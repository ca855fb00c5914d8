"""Every way a user's input or machine can fail, each with the exit code of the command line."""

from __future__ import annotations

from reprlib import Repr
from typing import Any

_LONGEST = 6000
"""Characters of a message: a hostile file has names and numbers of megabytes."""


class CkptBridgeError(Exception):
    """An error whose text a user can act on: what, where, expected, found, what to do."""

    exit_code = 3

    def __init__(self, message: str = "") -> None:
        if len(message) > _LONGEST:
            half = _LONGEST // 2
            message = f"{message[:half]} [... {len(message) - 2 * half} characters ...] {message[-half:]}"
        super().__init__(message)


class BadInputError(CkptBridgeError):
    """The input is missing, truncated, inconsistent or unsupported (exit code 3)."""


class NotSupportedError(BadInputError):
    """The input is sound, but this version does not know it (exit code 3)."""


class StorageError(CkptBridgeError):
    """The disk or the network failed (exit code 4); what was written so far is named in the text."""

    exit_code = 4


class MismatchError(CkptBridgeError):
    """A verification failed or two checkpoints differ (exit code 1)."""

    exit_code = 1


_SHORT = Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 100, 100


def told(value: Any) -> str:
    """A value from a file as a message repeats it: short, however large or deep the value is."""
    if type(value) is int and value.bit_length() > 256:
        return f"a whole number of {value.bit_length()} bits"
    return _SHORT.repr(value)
