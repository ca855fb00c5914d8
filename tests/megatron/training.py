"""A run of the real megatron-core on the CPU: model, distributed data parallelism, optimizer, save, load and step.

Only the pipeline's schedule is replaced, by the two sends that two stages need.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.activations import quick_gelu
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from snapshot import snapshot
from torch import Tensor

from ckptbridge.trainer.megatron import model as models

ITERATION = 2
LEARNING_RATE = 0.02


class Run:
    """One run on the ranks of this job: built for a layout, filled, trained, saved, loaded."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.case, self.distributed = case, case["distributed"]
        dtype = getattr(torch, case["dtype"])
        models.use_layout(**case["layout"])
        self.model: GPTModel = models.build(case["config"], local_names=False, dtype=dtype, **case["layout"])
        half = dtype == torch.bfloat16
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=self.distributed,
            overlap_grad_reduce=case["bucket_size"] is not None,  # buckets are made for nothing else
            bucket_size=case["bucket_size"],
        )
        fill(self.model)
        self.ddp = DistributedDataParallel(self.model.config, ddp, self.model)
        config = OptimizerConfig(
            optimizer="adam",
            lr=LEARNING_RATE,
            min_lr=0.0,
            weight_decay=0.1,
            clip_grad=1.0,
            bf16=half,
            params_dtype=dtype,
            use_distributed_optimizer=self.distributed,
        )
        self.optimizer = get_megatron_optimizer(config, [self.ddp])

    def step(self, number: int) -> float:
        """One step on the global batch of this number; the loss in nats a token, the same on every rank."""
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        tokens = self._batch(number)
        received, output = self._forward(tokens)
        loss = torch.zeros(())
        if self.model.post_process:
            scores = output[:, :-1].float().flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(scores, tokens[:, 1:].flatten())
            loss.backward()
        else:
            gradient = torch.empty_like(output)
            dist.recv(gradient, parallel_state.get_pipeline_model_parallel_next_rank())
            output.backward(gradient)
        if received is not None:
            dist.send(received.grad.contiguous(), parallel_state.get_pipeline_model_parallel_prev_rank())
        finalize_model_grads([self.ddp], pg_collection=None)
        self.optimizer.step()
        total = loss.detach().clone() * self.model.post_process
        dist.all_reduce(total)
        ranks = dist.get_world_size() // parallel_state.get_pipeline_model_parallel_world_size()
        return (total / ranks).item()

    def _batch(self, number: int) -> Tensor:
        """This data-parallel rank's part of a global batch of four sequences."""
        drawn = torch.randint(0, 250, (4, 16), generator=torch.Generator().manual_seed(number))
        return drawn.chunk(parallel_state.get_data_parallel_world_size())[parallel_state.get_data_parallel_rank()]

    def _forward(self, tokens: Tensor) -> tuple[Tensor | None, Tensor]:
        batch, length = tokens.shape
        positions = torch.arange(length).expand(batch, length)
        mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
        received = None
        if not self.model.pre_process:
            config = self.model.config
            received = torch.empty(length, batch, config.hidden_size, dtype=config.params_dtype)
            dist.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank())
            received.requires_grad_()
            self.model.set_input_tensor(received)
        output = self.ddp(tokens, positions, mask)
        if not self.model.post_process:
            dist.send(output.detach().contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
        return received, output

    def sharded(self, metadata: dict[str, Any], *, loading: bool) -> dict[str, Any]:
        """Megatron-LM's generate_state_dict for torch_dist, without the items that a load does not ask for."""
        state: dict[str, Any] = {"model": self.model.sharded_state_dict(metadata=dict(metadata))}
        state["optimizer"] = self.optimizer.sharded_state_dict(
            state["model"], is_loading=loading, metadata=dict(metadata)
        )
        return state

    def save_torch_dist(self, root: Path) -> None:
        """Save as Megatron-LM does with --dist-ckpt-optim-fully-reshardable."""
        metadata: dict[str, Any] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
        if self.distributed:
            metadata["distrib_optim_sharding_type"] = "fully_reshardable"
            metadata["distrib_optim_fully_reshardable_mem_efficient"] = False
        folder = root / f"iter_{ITERATION:07d}"
        if dist.get_rank() == 0:
            folder.mkdir(parents=True)
        dist.barrier()
        state = self.sharded(metadata, loading=False)
        dist_checkpointing.save(
            state | self.others("torch_dist") | {"rng_state": self.rng_state()}, str(folder), content_metadata=metadata
        )
        self._track(root)

    def load_torch_dist(self, root: Path) -> None:
        folder = root / f"iter_{ITERATION:07d}"
        metadata = dist_checkpointing.load_content_metadata(str(folder)) or {}
        state = dist_checkpointing.load(self.sharded(metadata, loading=True), str(folder))
        self.model.load_state_dict(state["model"], strict=True)
        self.optimizer.load_state_dict(state["optimizer"])

    def rng_state(self) -> ShardedObject:
        """Megatron-LM's key, shape and offset for the random states."""
        return ShardedObject(
            "rng_state",
            [{"torch_rng_state": torch.get_rng_state(), "random_rng_state": (3, (1, 2), None)}],
            (
                parallel_state.get_pipeline_model_parallel_world_size(),
                parallel_state.get_tensor_model_parallel_world_size(),
            ),
            (parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()),
            replica_id=parallel_state.get_data_parallel_rank(with_context_parallel=True),
        )

    def save_torch(self, root: Path) -> None:
        """Save as Megatron-LM does with --ckpt-format torch: save_checkpoint and save_parameter_state."""
        folder = self._rank_folder(root)
        if self.distributed:
            folder.mkdir(parents=True, exist_ok=True)
            self.optimizer.save_parameter_state(str(folder / "distrib_optim.pt"))
        first = parallel_state.get_data_parallel_rank() == 0 or parallel_state.get_expert_data_parallel_rank() == 0
        if first:
            folder.mkdir(parents=True, exist_ok=True)
            state = self.others("torch") | {
                "model": self.model.state_dict_for_save_checkpoint(),
                "optimizer": self.optimizer.state_dict(),
                "rng_state": [{"torch_rng_state": torch.get_rng_state()}],
            }
            torch.save(state, folder / "model_optim_rng.pt")
        self._track(root)

    def load_torch(self, root: Path) -> None:
        folder = self._rank_folder(root)
        state = torch.load(folder / "model_optim_rng.pt", weights_only=False)
        self.model.load_state_dict(state["model"], strict=True)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.distributed:
            with torch.no_grad():  # an fp32 main weight is the parameter itself, into which nothing else may copy
                self.optimizer.load_parameter_state(str(folder / "distrib_optim.pt"))

    def _rank_folder(self, root: Path) -> Path:
        name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
        if parallel_state.get_expert_model_parallel_world_size() > 1:
            name += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
        return root / f"iter_{ITERATION:07d}" / name

    def _track(self, root: Path) -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            (root / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
        dist.barrier()

    def others(self, ckpt_format: str) -> dict[str, Any]:
        """What Megatron-LM saves beside model and optimizer."""
        return {
            "args": self._args(ckpt_format),
            "checkpoint_version": 3.0,
            "iteration": ITERATION,
            "num_floating_point_operations_so_far": 12345,
            "opt_param_scheduler": {"max_lr": LEARNING_RATE, "num_steps": 8, "lr_decay_style": "cosine"},
        }

    def _args(self, ckpt_format: str) -> Namespace:
        config, gpt = self.model.config, self.case["config"]["gpt"]
        fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        own = {
            "padded_vocab_size": gpt["vocab_size"],
            "make_vocab_size_divisible_by": 128,
            "max_position_embeddings": gpt["max_sequence_length"],
            "position_embedding_type": gpt["position_embedding_type"],
            "add_position_embedding": True,
            "rotary_base": gpt["rotary_base"],
            "rotary_percent": gpt["rotary_percent"],
            "untie_embeddings_and_output_weights": not gpt["share_embeddings_and_output_weights"],
            "group_query_attention": True,
            "swiglu": config.activation_func is torch.nn.functional.silu,
            "quick_geglu": config.activation_func is quick_gelu,
            **{name: value for name, value in vars(config).items() if name.startswith("yarn_")},
            "num_experts": config.num_moe_experts,
            "world_size": dist.get_world_size(),
            "data_parallel_size": parallel_state.get_data_parallel_world_size(),
            "iteration": ITERATION,
            "consumed_train_samples": 8,
            "ckpt_format": ckpt_format,
            "use_distributed_optimizer": self.distributed,
            "overlap_grad_reduce": self.case["bucket_size"] is not None,
            "ddp_bucket_size": self.case["bucket_size"],
            "accumulate_allreduce_grads_in_fp32": True,
            "lr": LEARNING_RATE,
            "decoupled_lr": None,
            "no_save_optim": None,
            "no_save_rng": None,
        }
        return Namespace(**{key: value for key, value in fields.items() if not callable(value)}, **own)


def fill(model: GPTModel) -> None:
    """Draw weights by their place in the whole model: replicas agree, and no two shards are alike."""
    shards = model.sharded_state_dict()
    apply_factories(shards)
    with torch.no_grad():
        for shard in nested_values(shards):
            if isinstance(shard, ShardedTensor):
                drawn = _draw_for(shard)
                shard.data.copy_(1 + 0.3 * drawn if "norm" in shard.key else 0.1 * drawn)


def _draw_for(shard: ShardedTensor) -> Tensor:
    """The same numbers whatever the layout: the whole tensor is drawn, and the shard is cut from it."""
    generator = torch.Generator().manual_seed(crc32(shard.key.encode()))
    whole = torch.randn(shard.global_shape, generator=generator)
    extent = (*(1 for _ in range(shard.prepend_axis_num)), *shard.local_shape)
    place = tuple(slice(o, o + n) for o, n in zip(shard.global_offset, extent, strict=True))
    return whole[place].reshape(shard.local_shape)


def forgive_step() -> None:
    """megatron-core's distributed optimizer looks for torch's per-parameter step among what it has loaded, in vain.

    Its KeyError: 'step' keeps every run without Transformer Engine from resuming (0.19.2,
    `_set_main_param_and_optimizer_states`); the step itself has been set from the parameter groups before.
    """
    original = DistributedOptimizer._set_main_param_and_optimizer_states

    def forgiving(self: Any, model_param: Tensor, tensors: dict[str, Any]) -> None:
        original(self, model_param, {"step": None, **tensors})

    DistributedOptimizer._set_main_param_and_optimizer_states = forgiving


def train(case: dict[str, Any]) -> dict[str, Any]:
    """Two steps, saves as case["saves"] ({format: folder}) says; what was held; a third step and what is held then."""
    run = Run(case)
    losses = [run.step(number) for number in range(ITERATION)]
    writers: dict[str, Callable[[Path], None]] = {"torch_dist": run.save_torch_dist, "torch": run.save_torch}
    for ckpt_format, folder in case["saves"].items():
        writers[ckpt_format](Path(folder))
    return _finish(run, case, losses)


def resume(case: dict[str, Any]) -> dict[str, Any]:
    """Load case["folder"], tell what is held, and take the third step.

    Another step is taken before the load: without Transformer Engine, megatron-core's distributed optimizer fails an
    assertion (`len(steps) == 1`) when its state is asked for before the first one. The load has to undo all of it.
    """
    run = Run(case)
    run.step(99)
    loaders: dict[str, Callable[[Path], None]] = {"torch_dist": run.load_torch_dist, "torch": run.load_torch}
    loaders[case["format"]](Path(case["folder"]))
    _own_steps(run)
    return _finish(run, case, [])


def _own_steps(run: Run) -> None:
    """Give every parameter a step of its own.

    megatron-core's distributed optimizer loads one tensor as the step of all of them (0.19.2, `load_state_dict`), to
    which torch's Adam then adds 1 for each parameter. Fused Adams count in the groups and are not affected.
    """
    for optimizer in run.optimizer.chained_optimizers:
        for state in optimizer.optimizer.state.values():
            state["step"] = state["step"].clone()


def _finish(run: Run, case: dict[str, Any], losses: list[float]) -> dict[str, Any]:
    held = snapshot(run.model, run.optimizer.chained_optimizers)
    steps = sorted({_step_of(optimizer) for optimizer in run.optimizer.chained_optimizers})
    if case["third_step"]:
        losses.append(run.step(ITERATION))
    after = snapshot(run.model, run.optimizer.chained_optimizers)
    if dist.get_rank() == 0:
        torch.save({"held": held, "after": after}, case["out"] + ".pt")
    return {"losses": losses, "steps": steps}


def _step_of(optimizer: Any) -> float:
    return next(float(state["step"]) for state in optimizer.optimizer.state.values())
