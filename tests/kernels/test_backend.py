"""Backends: one is chosen by name, the log says why, and what cannot run says what can."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from ckptbridge.kernels.backend import BackendError, choose_backend, compiled, operations_backend, require_backend
from ckptbridge.kernels.swiglu import swiglu, swiglu_reference


def test_by_name():
    choice = choose_backend("torch", "cpu")
    assert (choice.name, choice.device) == ("torch", torch.device("cpu"))
    assert str(choice) == "Kernels on cpu: torch (asked for by name)."


def test_auto_takes_the_definition_without_a_gpu_and_triton_with_one(device):
    assert choose_backend("auto", "cpu").name == "reference"
    assert str(choose_backend("auto", "cpu")) == (
        "Kernels on cpu: reference (auto: without a GPU the definition itself is run)."
    )
    assert choose_backend("auto", device).name == ("triton" if device.type == "cuda" else "reference")


def test_transformer_engine_needs_a_gpu():
    expected = r"transformer_engine cannot run on cpu: .* not for cpu\. Available here: reference, torch"
    with pytest.raises(BackendError, match=expected):
        choose_backend("transformer_engine", "cpu")


def test_transformer_engine_is_no_backend_of_an_operation(device):
    with pytest.raises(BackendError, match="no single operations"):
        swiglu(torch.zeros(2, 8, device=device), backend="transformer_engine")
    assert [operations_backend(name) for name in ("reference", "transformer_engine")] == ["reference", "triton"]


def test_triton_is_refused_where_it_has_no_kernels():
    with pytest.raises(BackendError, match=r"triton cannot run on mps: .* not for mps"):
        require_backend("triton", torch.device("mps"))


def test_unknown_name():
    with pytest.raises(ValueError, match=r"expected one of reference, torch, triton, transformer_engine; found 'xla'"):
        choose_backend("xla", "cpu")


# torch.compile's own import deprecates a function of torch.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_compiled_reference_is_wrapped_once():
    assert compiled(swiglu_reference) is compiled(swiglu_reference)


PROGRAM = """
import sys
{before}
import torch
from ckptbridge.kernels.backend import BackendError, choose_backend
from ckptbridge.kernels.rms_norm import rms_norm
from ckptbridge.kernels.swiglu import swiglu
x = torch.ones(2, 8)
assert torch.allclose(rms_norm(x, torch.ones(8), 1e-5), x)
assert swiglu(x).shape == (2, 4)
assert choose_backend("auto", "cpu").name == "reference"
try:
    swiglu(x, backend="triton")
except BackendError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("before", "message"),
    [
        pytest.param(
            "sys.modules['triton'] = None",  # what makes every `import triton` fail
            "Triton is not installed (it comes with the CUDA builds of torch). Available here: reference, torch.",
            id="no-triton",
        ),
        pytest.param(
            "",
            "Triton runs on a CPU only with TRITON_INTERPRET=1 in the environment before the first import. "
            "Available here: reference, torch.",
            id="not-interpreted",
        ),
    ],
)
def test_everything_but_triton_runs_without_it(before, message):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    program = PROGRAM.format(before=before)
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == f"backend triton cannot run on cpu: {message}"
