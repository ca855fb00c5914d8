"""The fuzzer's worker with a hang planted at input 1 and a death at input 2: what watches it has to see both."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from tests.converters import fuzz_worker

_run = fuzz_worker.Fuzzer.run


def _planted(self: fuzz_worker.Fuzzer, number: int) -> dict[str, Any]:
    while number == 1:
        pass
    if number == 2:
        os.kill(os.getpid(), signal.SIGSEGV)
    return _run(self, number)


if __name__ == "__main__":
    fuzz_worker.Fuzzer.run = _planted  # type: ignore[method-assign]
    sys.exit(fuzz_worker.main())
