"""`ckptbridge` and `python -m ckptbridge`."""

from __future__ import annotations

import atexit
import gc
import os
import sys

_OBJECTS_BETWEEN_COLLECTIONS = 200_000
"""Python's own 700 make it look for garbage a thousand times while torch is loaded, and find none: 0.1 s of 1.1."""


def main() -> None:
    """Run the command line. `-` and `_` are interchangeable in flags."""
    # Read when torch is loaded: threads that spin while they wait for work make a step ten times slower as soon as
    # another program wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    atexit.register(_end)
    from ckptbridge.cli import app

    sys.argv[1:] = [_with_dashes(word) for word in sys.argv[1:]]
    app(prog_name="ckptbridge")


def _end() -> None:
    """Spare the last collection the walk through all of torch, which takes 0.2 s.

    Triton's bindings, where they are loaded, complain of every object that is not collected.
    """
    gc.unfreeze() if "triton" in sys.modules else gc.freeze()


def _with_dashes(word: str) -> str:
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


if __name__ == "__main__":
    main()
