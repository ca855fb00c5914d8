"""Four ranks that save with the real Megatron-FSDP: run by test_megatron_fsdp.py as `fsdp_worker.py JOB.json`.

A job is a list of cases, each under its own parallel layout. What is left of the four ranks shards the parameters.
Some cases are saved through Megatron's wrapper of torch's own FSDP instead.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from importlib import import_module
from pathlib import Path
from typing import Any

from job_ranks import process_group, start_ranks

ITERATION = 7


def main(job_file: Path) -> None:
    import_module("checkpoint")  # it imports torch and megatron, once for all ranks
    start_ranks(job_file, run_rank)


def run_rank(rank: int, job: dict[str, Any]) -> None:
    """All cases of the job, on one rank. An exception ends the job for every rank."""
    with process_group(rank, job), _meshes_on_cpu():
        for case in job["cases"]:
            save_torch_dcp(case) if case["torch"] else save(case)


def _meshes_on_cpu() -> Any:
    """Megatron-FSDP names the GPU by its number, makes meshes of GPUs, and keeps the random states of GPUs alike."""
    import torch
    from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
    from torch.distributed import DeviceMesh
    from torch.overrides import TorchFunctionMode

    from_group = DeviceMesh.from_group
    DeviceMesh.from_group = staticmethod(lambda group, device_type, **named: from_group(group, "cpu", **named))
    FullyShardedDataParallel.sync_rng_states_across_tp_group = lambda self: None

    class NumberedDevices(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.device and "cuda" in str(args[0]):
                return torch.device("cpu")
            return func(*args, **kwargs or {})

    return NumberedDevices()


def save(case: dict[str, Any]) -> None:
    """Fill a bf16 model from case["weights"], train it a step of nothing, and save it as Megatron-LM 0.19 does.

    The order of calls is that of training/checkpointing.py: save_checkpoint, generate_state_dict,
    preprocess_fsdp_dtensor_state_dict.
    """
    import torch
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
    from megatron.core.distributed.fsdp.src.megatron_fsdp.uneven_dtensor import preprocess_state_dict_for_uneven_dtensor
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.fsdp_dtensor_checkpoint import (
        handle_experts_in_state_dict,
        handle_fp8_extra_state_case,
        handle_swiglu_in_state_dict,
    )
    from megatron.core.transformer.module import Float16Module

    gpt, args = _model(case)
    args.ckpt_format = "fsdp_dtensor"
    options = DistributedDataParallelConfig(
        use_megatron_fsdp=True, data_parallel_sharding_strategy="optim_grads_params", use_distributed_optimizer=True
    )
    wrapped = FullyShardedDataParallel(gpt.config, options, Float16Module(gpt.config, gpt))
    # A rate of 0 leaves the weights as they are, and the gradients make moments that tell parameters apart.
    settings = OptimizerConfig(optimizer="adam", lr=0.0, weight_decay=0.0, bf16=True, use_distributed_optimizer=True)
    optimizer = get_megatron_optimizer(settings, [wrapped])
    for group in optimizer.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = parameter.detach().clone()
    optimizer.optimizer.step()
    unwrapped = wrapped.module  # as Megatron-LM's unwrap_model leaves it
    state: dict[str, Any] = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": ITERATION,
        "num_floating_point_operations_so_far": 0,
        "model": unwrapped.state_dict_for_save_checkpoint(),
    }
    sharding = {"distrib_optim_sharding_type": "fsdp_dtensor"}
    state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=False, metadata=sharding)
    state["opt_param_scheduler"] = {"max_lr": 1e-3, "num_steps": 7}
    state["rng_state"] = {"(0, 0)": [{"torch_rng_state": torch.get_rng_state()}]}
    handle_fp8_extra_state_case(state["model"])
    state["model"], state["optimizer"] = handle_swiglu_in_state_dict(unwrapped, state["model"], state["optimizer"])
    if gpt.config.num_moe_experts:
        state["model"] = handle_experts_in_state_dict(state["model"], gpt.config.num_moe_experts)
    preprocess_state_dict_for_uneven_dtensor(state)
    _write(state, Path(case["folder"]))


def save_torch_dcp(case: dict[str, Any]) -> None:
    """The same model in torch's fully_shard, saved as Megatron-LM does for --ckpt-format torch_dcp, weights alone."""
    from megatron.core.distributed import DistributedDataParallelConfig, TorchFullyShardedDataParallel
    from megatron.core.transformer.module import Float16Module

    gpt, args = _model(case)
    args.ckpt_format = "torch_dcp"
    gpt.config.transformer_impl = "local"  # which modules are sharded together depends on it
    TorchFullyShardedDataParallel(gpt.config, DistributedDataParallelConfig(), Float16Module(gpt.config, gpt))
    state = {"args": args, "checkpoint_version": 3.0, "iteration": ITERATION}
    _write({**state, "model": gpt.state_dict_for_save_checkpoint()}, Path(case["folder"]))


def _model(case: dict[str, Any]) -> tuple[Any, Namespace]:
    """The model in bf16 with the weights of a torch_dist folder, and what Megatron-LM would call its arguments."""
    import checkpoint
    import torch
    from megatron.core import dist_checkpointing

    from ckptbridge.trainer.megatron import model

    model.use_layout(**case["layout"])
    gpt = model.build(case["config"], local_names=False, dtype=torch.bfloat16, **case["layout"])
    wanted = {"model": gpt.sharded_state_dict(metadata=dist_checkpointing.load_content_metadata(case["weights"]))}
    gpt.load_state_dict(dist_checkpointing.load(wanted, case["weights"])["model"])
    return gpt, checkpoint._args(gpt, case["config"]["gpt"])


def _write(state: dict[str, Any], root: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.checkpoint import save as save_distributed

    save_distributed(state_dict=state, storage_writer=FileSystemWriter(root / f"iter_{ITERATION:07d}"))
    if dist.get_rank() == 0:
        (root / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
