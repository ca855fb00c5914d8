"""A step as one CUDA graph: the same bits as operation by operation, and a sentence where there can be none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.model import decoder_tensors, open_model
from ckptbridge.trainer.activation_memory import spare_memory
from ckptbridge.trainer.loading import empty_decoder
from ckptbridge.trainer.optimizer import Optimizer
from ckptbridge.trainer.recipe import OptimizerSection
from ckptbridge.trainer.step_graph import EAGER_CALLS, StepGraph
from ckptbridge.trainer.update import Graph, Update
from tests.conftest import TinyFolders
from tests.tiny import token_ids

STEPS = 6


def on_gpu(test: Any) -> Any:
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")(test))


def update_of(folder: Path, device: str, graph: Graph, dtype: torch.dtype = torch.bfloat16) -> Update:
    model = open_model(folder)
    backend = "triton" if device == "cuda" else "reference"
    decoder = empty_decoder(model.config, backend, dtype, torch.device(device))
    optimizer = Optimizer(decoder, OptimizerSection(lr=1e-3))
    optimizer.load_weights(decoder_tensors(model.tensors, model.config))
    return Update(decoder, optimizer, micro_batch_size=2, aux_loss_coeff=0.01, graph=graph)


def steps_of(update: Update) -> list[tuple[Any, ...]]:
    """Losses, norms and loads of some steps, and at last the weights."""
    told: list[tuple[Any, ...]] = []
    for step in range(STEPS):
        read = update.take(token_ids(4).roll(step, 1), 1e-3 / (step + 1))
        told.append((read.loss, read.grad_norm, read.aux_loss, read.expert_load))
    return told


def weights_of(update: Update) -> dict[str, Tensor]:
    return {name: main.detach().clone() for name, main in update.optimizer.main.items()}


@on_gpu
@pytest.mark.parametrize("name", ["llama_tied", "mixtral", "qwen3_moe", "qwen2_moe"])
@pytest.mark.parametrize("spared", ["none", "selective", "full", "offload"])
def test_a_replayed_step_has_the_bits_of_an_eager_one(name: str, spared: str, tiny_folder: TinyFolders) -> None:
    runs: dict[str, Update] = {}
    told: dict[str, list[tuple[Any, ...]]] = {}
    for run, graph in (("eager", "off"), ("again", "off"), ("graph", "on")):
        runs[run] = update_of(tiny_folder(name), "cuda", graph)
        recompute = spared if spared in ("selective", "full") else "none"
        spare_memory(runs[run].decoder, recompute=recompute, offload=spared == "offload", least_bytes=1)
        told[run] = steps_of(runs[run])
    assert "one CUDA graph" in (runs["graph"].graph_sentence or "")
    assert len({line[0] for line in told["graph"]}) == STEPS, "a replay did not read its own batch"
    weights = {run: weights_of(update) for run, update in runs.items()}
    same = all(torch.equal(weights["eager"][key], weights["again"][key]) for key in weights["eager"])
    if same:
        assert told["graph"] == told["eager"]
        assert [key for key in weights["eager"] if not torch.equal(weights["eager"][key], weights["graph"][key])] == []
    else:  # cuDNN's backward of attention may add in another order each time
        for one, other in zip(told["eager"], told["graph"], strict=True):
            assert one[0] == pytest.approx(other[0], abs=2**-8 * one[0])


@on_gpu
def test_what_waits_for_the_gpu_is_found_and_goes_on_without_a_graph() -> None:
    value = torch.zeros((), device="cuda")

    def function() -> float:
        return value.add_(1).item()

    graph = StepGraph(function, value.device, forget=lambda: pytest.fail("nothing was captured"))
    assert [graph() for _ in range(5)] == [1, 2, 3, 4, 5]
    assert not graph.is_captured
    assert "test_step_graph.py" in (graph.obstacle or "")


@on_gpu
def test_a_capture_that_fails_leaves_nothing_behind() -> None:
    value, forgotten = torch.zeros((), device="cuda"), list[int]()

    def function() -> Tensor:
        value.add_(1)
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("this operation cannot be captured")
        return value

    graph = StepGraph(function, value.device, forget=lambda: forgotten.append(1))
    assert [graph().item() for _ in range(5)] == [1, 2, 3, 4, 5]
    assert forgotten == [1]
    assert "cannot be captured" in (graph.obstacle or "")


@on_gpu
def test_replays_begin_behind_the_eager_calls() -> None:
    value, calls = torch.zeros((), device="cuda"), list[int]()

    def function() -> Tensor:
        calls.append(1)
        return value.add_(1)

    graph = StepGraph(function, value.device, forget=lambda: None)
    assert [graph().item() for _ in range(6)] == [1, 2, 3, 4, 5, 6]
    assert graph.is_captured
    assert len(calls) == EAGER_CALLS + 1


def test_a_cpu_has_no_graph_and_says_so(tiny_folder: TinyFolders) -> None:
    with pytest.raises(BadInputError, match=r"kernels\.graph"):
        update_of(tiny_folder("llama_tied"), "cpu", "on", torch.float32)
    for graph, why in (("auto", "only a bf16 run on a GPU"), ("off", "kernels.graph is off")):
        update = update_of(tiny_folder("llama_tied"), "cpu", graph, torch.float32)
        assert why in (update.graph_sentence or "")


def test_numbers_of_a_step_come_in_one_transfer(tiny_folder: TinyFolders) -> None:
    """What the log is told is what the batch said, number for number."""
    update = update_of(tiny_folder("qwen2_moe"), "cpu", "off", torch.float32)
    read = update.take(token_ids(4), 1e-3)
    layers = len(update.decoder.decoder.layers)
    assert set(read.expert_load) == set(range(layers))
    assert all(sum(load) == pytest.approx(1, abs=1e-6) for load in read.expert_load.values())
    assert read.aux_loss is not None
    assert 1 <= read.aux_loss < 8
