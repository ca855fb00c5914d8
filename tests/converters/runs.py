"""Checkpoints of runs with an optimizer, made without megatron: what resharding is tried on."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from ckptbridge.converters.convert import ConversionPlan, ConvertOptions
from ckptbridge.converters.execute import execute
from ckptbridge.converters.mcore.optimizer.state import open_optimizer
from ckptbridge.converters.model import Model, decoder_tensors, open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.reshard import plan_reshard
from ckptbridge.converters.training_checkpoint import save_training_checkpoint

ITERATION = 7
STATES = ("param", "exp_avg", "exp_avg_sq")
OTHERS: dict[str, Any] = {
    "opt_param_scheduler": {"max_lr": 1e-3, "num_steps": 7},
    "num_floating_point_operations_so_far": 2**60,
    "ckptbridge_trainer": {"step": 7, "data": {"offset": [1, 2]}},
}


def group(wd_mult: float, *, experts: bool = False, **more: Any) -> dict[str, Any]:
    """A parameter group as Megatron's distributed optimizer saves it."""
    return {
        "lr": 1e-3,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "wd_mult": wd_mult,
        "lr_mult": 1.0,
        "is_expert_parallel": experts,
        "is_decoupled_lr": False,
        "default_config": True,
        "step": 7,
        **more,
    }


def megatron_optimizer(**more: Any) -> dict[str, Any]:
    """`optimizer` in the common state of a run without expert parallelism."""
    groups = [group(1.0, **more), group(0.0, **more)]
    return {"optimizer": {"param_groups": groups}, "param_state_sharding_type": "fully_reshardable"}


def drawn(model: Model, state: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Tensors under the decoder's names, no two alike. Weights are the rounding of `param`; expert biases stay fp32."""
    made: dict[str, Tensor] = {}
    for name, lazy in decoder_tensors(model.tensors, model.config).items():
        generator = torch.Generator().manual_seed(crc32(f"{state or 'param'} {name}".encode()))
        made[name] = torch.randn(lazy.shape, generator=generator)
        if not name.endswith(".expert_bias"):
            made[name] = made[name].to(dtype)
    return made


def save_run(
    hf: Path,
    root: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    optimizer: dict[str, Any] | None = None,
    states: tuple[str, ...] = STATES,
) -> Model:
    """A run's checkpoint at step 7, opened. `optimizer` is what Megatron keeps; None: it is the trainer's own."""
    model = open_model(hf)
    save_training_checkpoint(
        root,
        model=model,
        iteration=ITERATION,
        weights=drawn(model, "", dtype),
        optimizer={state: drawn(model, state) for state in states},
        common=OTHERS | ({} if optimizer is None else {"optimizer": optimizer}),
    )
    return open_model(root)


def reshard(
    source: Model, target: Path, to: str, layout: ParallelLayout, *, optimizer: str = "keep", **options: Any
) -> Model:
    """Carry out a plan; returns the opened target."""
    execute(reshard_plan(source, target, to, layout, optimizer=optimizer, **options))
    return open_model(target)


def reshard_plan(
    source: Model, target: Path, to: str, layout: ParallelLayout, *, optimizer: str = "keep", **options: Any
) -> ConversionPlan:
    options = {"workers": 1, "max_file_size": 150_000} | options
    return plan_reshard(source, target, to, ConvertOptions(layout=layout, **options), optimizer=optimizer)  # type: ignore[arg-type]


def held(model: Model) -> dict[str, dict[str, Tensor]]:
    """Every weight and optimizer tensor of a checkpoint, by state and decoder name."""
    optimizer = open_optimizer(model)
    states = {"": model.tensors} | (dict(optimizer.states) if optimizer else {})
    return {
        state: {n: lazy.read() for n, lazy in decoder_tensors(tensors, model.config).items()}
        for state, tensors in states.items()
    }


def expected(model: Model, dtype: torch.dtype = torch.bfloat16) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint of `save_run` has to hold: no state of what Megatron does not train."""
    states = {state: drawn(model, state) for state in STATES}
    return {"": drawn(model, "", dtype)} | {
        state: {name: tensor for name, tensor in held.items() if not name.endswith(".expert_bias")}
        for state, held in states.items()
    }


def assert_same(found: dict[str, dict[str, Tensor]], wanted: dict[str, dict[str, Tensor]]) -> None:
    """Every state and tensor, bit for bit."""
    assert found.keys() == wanted.keys()
    for state, tensors in wanted.items():
        assert found[state].keys() == tensors.keys()
        for name, tensor in tensors.items():
            back = found[state][name]
            assert back.dtype == tensor.dtype
            assert torch.equal(back, tensor), f"{state} {name}"
