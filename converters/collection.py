"""Planning without the garbage collector: a plan is hundreds of thousands of objects, none of them a cycle."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Generator[None]:
    """Within it nothing is searched for cycles: 2.4 of 8.6 s at 360,000 pieces. References count as always."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
