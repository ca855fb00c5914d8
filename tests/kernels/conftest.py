"""Without a GPU the Triton kernels run under Triton's interpreter, on numpy: decided here, for the whole process.

Triton decides between compiling and interpreting when a function is decorated, so TRITON_INTERPRET must be set before
Triton and the kernels are imported. Other rooms' tests may have been collected first, and a transformers model imports
Triton; then the modules whose decorated functions the kernels use are executed again. The module objects stay the same,
so whoever imported them keeps working, and no compiled kernel could have run in such a process anyway.

Each access of an interpreted kernel is checked as well (checked_memory.py).
"""

from __future__ import annotations

import importlib
import os
import sys

import pytest
import torch

from tests.kernels.checked_memory import check_memory


def _interpret_triton() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    if "triton" not in sys.modules:
        return
    import triton

    # In the order of their imports: tl.sum and tl.sigmoid are decorated functions, which triton.language re-exports.
    importlib.reload(triton.language.standard)
    importlib.reload(triton.language)
    kernels = [module for name, module in sys.modules.items() if name.startswith("ckptbridge.kernels.")]
    # A file that imports a kernel may be reloaded before the file that the kernel is from: it needs another round.
    for _ in kernels:
        for module in kernels:
            if any(isinstance(value, triton.JITFunction) for value in vars(module).values()):
                importlib.reload(module)


if not torch.cuda.is_available():
    _interpret_triton()
    check_memory()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the Triton kernels run: the GPU, or interpreted on the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
