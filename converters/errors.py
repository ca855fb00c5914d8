"""Every way a user's input or machine can fail, each with the exit code of the command line."""

from __future__ import annotations


class CkptBridgeError(Exception):
    """An error whose text a user can act on: what, where, expected, found, what to do."""

    exit_code = 3


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
