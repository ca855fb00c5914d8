"""The kernels compile for GPUs that nobody here has: what the interpreter takes, a compiler may refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

COMPILED = "tests.kernels.compiled"
"""In a process of its own: this one interprets."""


def compiled(capability: int) -> list[dict]:
    command = [sys.executable, "-m", COMPILED, str(capability)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr[-4000:]
    return [json.loads(line) for line in process.stdout.splitlines()]


# Compute capability and the shared memory that a program may have there, in bytes (CUDA C++ Programming Guide).
@pytest.mark.parametrize(("capability", "most"), [(80, 166_912), (90, 232_448), (100, 232_448), (120, 101_376)])
@pytest.mark.skipif(torch.cuda.is_available(), reason="here the kernels run")
def test_grouped_products_compile_and_fit(capability, most):
    kernels = compiled(capability)
    engines = {made["engine"] for made in kernels}
    assert engines == ({"triton", "gluon"} if capability == 90 else {"triton"})
    assert {made["kind"] for made in kernels} >= {"transposed", "plain", "gathered", "weight_gradient"}
    for made in kernels:
        assert made["shared"] <= most, made
