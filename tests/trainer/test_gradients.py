"""Loss and every gradient of the whole decoder against transformers' own model, in fp32.

benchmarks/decoder_agreement.py does the same in bf16 too, and on a real model.
"""

from __future__ import annotations

import pytest
import torch

from ckptbridge.converters.model import Model, open_model
from tests.tiny import VOCAB_SIZE, save_tiny
from tests.trainer.decoder_sides import FAULTS, Fault, Outcome, Subject, ours, theirs

ALLOWED = 1e-5
"""Of the loss, and of |ours - theirs| / |theirs| of every gradient."""
MODELS = ["llama", "qwen3_moe", "mixtral", "qwen2_moe", "deepseek_v3_saved", "gpt_oss", "granite", "nemotron"]
"""The last three have biases of experts, sinks and windows; multipliers; LayerNorm and squared ReLU."""
CPU, FP32 = torch.device("cpu"), torch.float32


@pytest.fixture(scope="module", params=MODELS)
def sides(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Subject, Model, Outcome]:
    """A model with tokens for it, and what transformers makes of them."""
    folder = save_tiny(request.param, tmp_path_factory.mktemp("sides") / request.param, torch.bfloat16)
    batch = torch.randint(VOCAB_SIZE, (2, 65), generator=torch.Generator().manual_seed(5))
    subject, model = Subject(request.param, folder, batch), open_model(folder)
    return subject, model, theirs(subject, model, FP32, CPU, is_plain=True)


def check(found: Outcome, truth: Outcome) -> None:
    """AssertionError names what is off."""
    assert abs(found.loss - truth.loss) <= ALLOWED * truth.loss, "loss"
    assert found.gradients.keys() == truth.gradients.keys()
    for name, expected in truth.gradients.items():
        error = torch.linalg.vector_norm((found.gradients[name] - expected).double())
        assert error <= ALLOWED * torch.linalg.vector_norm(expected.double()), name


def test_loss_and_gradients_are_those_of_transformers(sides: tuple[Subject, Model, Outcome]) -> None:
    subject, model, truth = sides
    check(ours(subject, model, FP32, CPU, "reference", Fault()), truth)


def test_every_planted_fault_is_found(sides: tuple[Subject, Model, Outcome]) -> None:
    subject, model, truth = sides
    for fault in FAULTS[FP32].values():
        if truth.choices or not fault.needs_experts:
            with pytest.raises(AssertionError):
                check(ours(subject, model, FP32, CPU, "reference", fault), truth)
