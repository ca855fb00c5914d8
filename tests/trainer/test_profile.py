"""Where a step's time went: every operation falls to the part that it belongs to, forward and backward."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from ckptbridge.converters.model import decoder_tensors, open_model
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.trainer.loading import empty_decoder
from ckptbridge.trainer.optimizer import Optimizer
from ckptbridge.trainer.profile_floors import Rates, costs, measured_rates
from ckptbridge.trainer.profile_parts import PARTS, RANGE, marked, part_of
from ckptbridge.trainer.profile_run import Profiler, ProfileWindow
from ckptbridge.trainer.profile_trace import read_trace, spent
from ckptbridge.trainer.recipe import OptimizerSection
from ckptbridge.trainer.update import Update
from tests.conftest import TinyFolders
from tests.tiny import token_ids


@pytest.mark.parametrize(
    ("name", "around", "part"),
    [
        ("nvjet_hsh_128x256", ["aten::mm", "_Linear", RANGE + "NormLinear", RANGE + "SelfAttention"], "projections"),
        ("nvjet_hsh_128x256", ["aten::mm", RANGE + "NormLinear", RANGE + "Mlp", RANGE + "Layer"], "dense products"),
        ("_forward_kernel", ["_RmsNorm", RANGE + "NormLinear", RANGE + "SelfAttention"], "norms"),
        ("elementwise", ["aten::mul", RANGE + "NormLinear", RANGE + "Mlp"], "norms"),
        ("cudnn_generated_fort_native_sdpa", [RANGE + "CoreAttention", RANGE + "SelfAttention"], "attention"),
        ("_matmul_kernel", ["_Experts", RANGE + "Experts", RANGE + "Mixture"], "expert products"),
        ("weight_gradient_kernel", ["_Experts", RANGE + "Experts", RANGE + "Mixture"], "expert products"),
        ("_backward_kernel", ["_Experts", RANGE + "Experts", RANGE + "Mixture"], "activation"),
        ("_gather_kernel", ["_GatherRows", "_Experts", RANGE + "Experts"], "dispatch"),
        ("_sum_kernel", ["_SumRows", "_Experts", RANGE + "Experts"], "combine"),
        ("_place_kernel", [RANGE + "Mixture", RANGE + "Layer"], "dispatch"),
        ("gemm", ["_RouterLogits", RANGE + "Router", RANGE + "Mixture"], "router"),
        ("_adam_kernel", [RANGE + "optimizer"], "optimizer"),
        ("gemm", [], "other"),
    ],
)
def test_kernels_fall_to_parts(name: str, around: list[str], part: str) -> None:
    assert part_of(name, around) == part


ENGINE = "autograd::engine::evaluate_function: "


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args: int) -> dict[str, object]:
    told = {key.replace("_", " "): value for key, value in args.items()}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": told}


def test_kernels_are_found_through_their_launch_and_through_autograds_number() -> None:
    events = [
        event("user_annotation", RANGE + "Experts", 0, 100),
        event("cpu_op", "_Experts", 10, 50, Sequence_number=7, Fwd_thread_id=0),
        event("cuda_driver", "cuLaunchKernelEx", 20, 1, correlation=1),
        event("kernel", "_matmul_kernel", 200, 30, 9, correlation=1),
        event("cpu_op", "aten::add", 70, 5, Sequence_number=8, Fwd_thread_id=0),
        # The backward pass, in another thread.
        event(
            "cpu_op",
            "autograd::engine::evaluate_function: _ExpertsBackward",
            300,
            50,
            2,
            Sequence_number=7,
            Fwd_thread_id=1,
        ),
        event("cpu_op", "_ExpertsBackward", 305, 40, 2, Sequence_number=7, Fwd_thread_id=1),
        event("cpu_op", "_GatherRows", 310, 10, 2, Sequence_number=8, Fwd_thread_id=0),
        event("cuda_driver", "cuLaunchKernelEx", 312, 1, 2, correlation=2),
        event("kernel", "_gather_kernel", 400, 4, 9, correlation=2),
        event("cuda_driver", "cuLaunchKernelEx", 330, 1, 2, correlation=3),
        event("kernel", "_matmul_kernel", 410, 60, 9, correlation=3),
        event("gpu_memcpy", "Memcpy HtoD", 500, 2, 9, correlation=99),
        # The same number again: each thread counts for itself, and the operation above is no forward one.
        event("user_annotation", RANGE + "SelfAttention", 600, 100),
        event("cpu_op", "aten::mm", 610, 50, Sequence_number=8, Fwd_thread_id=0),
        event("cpu_op", ENGINE + "MmBackward0", 800, 50, 2, Sequence_number=8, Fwd_thread_id=1),
        event("cuda_runtime", "cudaLaunchKernel", 810, 1, 2, correlation=4),
        event("kernel", "nvjet_hsh", 900, 7, 9, correlation=4),
    ]
    found = spent(json.loads(json.dumps(events)))
    assert dict(found.parts) == {"expert products": 90, "dispatch": 4, "other": 2, "projections": 7}


@pytest.mark.parametrize("name", ["qwen2_moe", "llama_tied"])
def test_a_steps_operations_fall_to_parts_in_both_directions(
    name: str, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    model = open_model(tiny_folder(name))
    decoder = empty_decoder(model.config, "reference", torch.float32, torch.device("cpu"))
    optimizer = Optimizer(decoder, OptimizerSection())
    optimizer.load_weights(decoder_tensors(model.tensors, model.config))
    update = Update(decoder, optimizer, micro_batch_size=2, aux_loss_coeff=0.01, graph="off")
    update.take(token_ids(4), 1e-4)
    with (
        profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler,
        marked(decoder),
        record_function("whole"),
    ):
        update.take(token_ids(4), 1e-4)
    profiler.export_chrome_trace(str(tmp_path / "trace.json.gz"))
    events = read_trace(tmp_path / "trace.json.gz")
    found = spent(events)
    whole = next(event["dur"] for event in events if event.get("name") == "whole")
    assert set(found.parts) <= set(PARTS)
    assert sum(found.parts.values()) == pytest.approx(whole, rel=0.05)
    mixture = {"router", "dispatch", "expert products", "activation"} if name == "qwen2_moe" else {"dense products"}
    assert {"attention", "projections", "norms", "head and loss", "optimizer", *mixture} <= set(found.parts)
    products = ("aten::mm", "aten::addmm")
    by_part = {part for part, operation in found.names if operation in products}
    assert "other" not in by_part
    assert "attention" not in by_part
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in decoder.modules())


def test_what_runs_between_two_steps_does_not_count() -> None:
    events = [
        event("user_annotation", "step", 0, 100),
        event("cpu_op", "aten::mm", 10, 20),
        event("cuda_driver", "cuLaunchKernelEx", 20, 1, correlation=1),
        event("kernel", "nvjet_a", 130, 30, 9, correlation=1),  # launched in the step, run behind its range
        event("cpu_op", "aten::mm", 110, 20),  # an evaluation
        event("cuda_driver", "cuLaunchKernelEx", 120, 1, correlation=2),
        event("kernel", "nvjet_b", 160, 500, 9, correlation=2),
        event("user_annotation", "step", 700, 50),
        event("cuda_driver", "cuLaunchKernelEx", 710, 1, 2, correlation=3),  # by another thread
        event("kernel", "nvjet_a", 720, 7, 9, correlation=3),
    ]
    assert {name: us for (_, name), us in spent(events, within="step").names.items()} == {"nvjet_a": 37}
    assert sum(spent(events).parts.values()) == 537
    on_host = [made for made in events if made["cat"] in ("user_annotation", "cpu_op")]
    assert sum(spent(on_host, within="step").parts.values()) == 150


def test_an_evaluation_between_profiled_steps_is_not_in_the_table(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    model = open_model(tiny_folder("qwen2_moe"))
    decoder = empty_decoder(model.config, "reference", torch.float32, torch.device("cpu"))
    optimizer = Optimizer(decoder, OptimizerSection())
    optimizer.load_weights(decoder_tensors(model.tensors, model.config))
    update = Update(decoder, optimizer, micro_batch_size=2, aux_loss_coeff=0.01, graph="off")
    window = ProfileWindow(Profiler(decoder, tmp_path, Rates(matrix=1e12, copy=1e10), {}), first=2, steps=3)
    for step in range(1, 6):
        with window.step(step) as is_profiled:
            update.take(token_ids(4), 1e-4, is_profiled=is_profiled)
        torch.linalg.svd(torch.ones(50, 50))  # what an evaluation is to a step
    assert window.profile is not None
    assert window.profile.steps == 3
    events = read_trace(Path(window.profile.trace))
    names = {name for _, name in spent(events).names}
    assert "aten::linalg_svd" in names
    counted = {name for _, name in spent(events, within="step").names}
    assert "aten::linalg_svd" not in counted
    assert {"aten::mm", "_Experts"} <= counted
    busy = sum(spent(events, within="step").parts.values())
    assert window.profile.busy_ms == pytest.approx(busy / 1e3 / 3)
    assert busy < sum(spent(events).parts.values())


def test_modules_are_marked_only_while_asked() -> None:
    class Router(nn.Linear):
        pass

    router = Router(2, 2)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        router(torch.ones(1, 2))
        with marked(router):
            router(torch.ones(1, 2))
    assert [event.name for event in profiler.events() if event.name.startswith(RANGE)] == [RANGE + "Router"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpus_kernels_fall_to_parts(tmp_path: Path) -> None:
    config = ModelConfig(
        num_layers=2,
        hidden_size=1024,
        ffn_hidden_size=2048,
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=128,
        vocab_size=4096,
        num_moe_experts=16,
        moe_ffn_hidden_size=512,
        moe_router_topk=4,
        moe_shared_expert_intermediate_size=1024,
        qk_layernorm=True,
    )
    rates = measured_rates(torch.device("cuda"), torch.bfloat16)
    assert 50e12 < rates.matrix < 5e15
    assert 0.3e12 < rates.copy < 20e12
    decoder = empty_decoder(config, "triton", torch.bfloat16, torch.device("cuda"))
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
    update = Update(
        decoder, Optimizer(decoder, OptimizerSection()), micro_batch_size=2, aux_loss_coeff=0.01, graph="auto"
    )
    batch = torch.randint(0, 4096, (4, 2049))
    sizes = {"element": 2, "moment": 4, "parameters": sum(parameter.numel() for parameter in decoder.parameters())}
    window = ProfileWindow(
        Profiler(decoder, tmp_path, rates, costs(config, length=2048, tokens=4 * 2048, **sizes)), first=3, steps=2
    )
    for step in range(1, 7):
        with window.step(step) as is_profiled:
            update.take(batch, 1e-5, is_profiled=is_profiled)
    assert "one CUDA graph" in (update.graph_sentence or "")
    profile = window.profile
    assert profile is not None
    parts = {part.part: part for part in profile.parts}
    assert set(parts) == set(PARTS)
    assert parts["other"].share < 0.1, parts["other"].kernels
    assert all(part.ms > 0 for part in profile.parts)
    # No product is faster than its floor, but for the noise of the rate. (What is as small as here a cache holds.)
    for part in ("attention", "projections", "dense products", "expert products", "head and loss"):
        assert parts[part].ms > 0.8 * (parts[part].floor_ms or 0)
    sys.stderr.write("\n".join(profile.lines()) + "\n")
