"""Load and save torch_dist checkpoints with megatron-core, as Megatron-LM does."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.activations import squared_relu
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from ckptbridge.trainer.megatron.model import logits

# What Megatron-LM's _build_sharded_state_dict_metadata returns without a distributed optimizer.
CONTENT_METADATA = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}


def load(model: GPTModel, case: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
    """Load case["folder"]; compare the logits of every replica with case["expected"].

    "unread" are keys of the checkpoint that no rank asked for (megatron-core's word: missing), "absent" those
    that a rank asked for in vain (megatron-core's word: unexpected); nothing is computed when there are any.
    With case["default_strictness"] both are empty: megatron-core raises an error where it minds.
    """
    metadata = dist_checkpointing.load_content_metadata(case["folder"])
    wanted = {"model": model.sharded_state_dict(metadata=dict(metadata or {}))}
    if case["default_strictness"]:
        loaded, unread, absent = dist_checkpointing.load(wanted, case["folder"]), set(), set()
    else:
        loaded, unread, absent = dist_checkpointing.load(wanted, case["folder"], strict="return_all")
    absent = sorted(set().union(*_of_all_ranks(absent)))
    difference = None
    if not absent:
        model.load_state_dict(loaded["model"], strict=True)
        output, expected = logits(model, tokens), torch.load(case["expected"])
        if output is not None:
            difference = (output[..., : expected.shape[-1]] - expected).abs().max().item()
        difference = max(d for d in _of_all_ranks(difference) if d is not None)
    return {"max_abs_diff": difference, "unread": sorted(unread), "absent": absent}


def save(model: GPTModel, case: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
    """Fill the model, save it as iteration 7 under case["folder"], and its logits as case["logits"]."""
    root, rank = Path(case["folder"]), dist.get_rank()
    folder = root / "iter_0000007"
    _fill(model)
    if rank == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    data_parallel = parallel_state.get_data_parallel_group(with_context_parallel=True)
    dist_checkpointing.save(
        {
            "args": _args(model, case["config"]["gpt"]),
            "checkpoint_version": 3.0,
            "iteration": 7,
            "num_floating_point_operations_so_far": 0,
            "model": model.sharded_state_dict(metadata=dict(CONTENT_METADATA)),
            "rng_state": _rng_state(),
        },
        str(folder),
        FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy("torch_dist"), data_parallel),
        content_metadata=dict(CONTENT_METADATA),
    )
    output = logits(model, tokens)
    if output is not None and rank == dist.get_world_size() - 1:  # the last rank is in the last stage
        torch.save(output, case["logits"])
    if rank == 0:
        (root / "latest_checkpointed_iteration.txt").write_text("7")
    dist.barrier()
    return {}


def _of_all_ranks(value: Any) -> list[Any]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def _fill(model: GPTModel) -> None:
    """Draw weights by their place in the whole model: replicas agree, and no two shards are alike."""
    shards = model.sharded_state_dict(metadata=dict(CONTENT_METADATA))
    apply_factories(shards)
    for shard in nested_values(shards):
        if isinstance(shard, ShardedTensor):
            seed = crc32(f"{shard.key} {shard.global_offset}".encode())
            drawn = torch.randn(shard.local_shape, generator=torch.Generator().manual_seed(seed))
            shard.data.copy_(1 + 0.3 * drawn if "norm" in shard.key else 0.1 * drawn)


def _rng_state() -> ShardedObject:
    """Megatron-LM's key, shape and offset for the random states; this one holds torch's alone."""
    return ShardedObject(
        "rng_state",
        [{"torch_rng_state": torch.get_rng_state()}],
        (
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_world_size(),
        ),
        (parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()),
        replica_id=parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )


def _args(model: GPTModel, gpt: dict[str, Any]) -> Namespace:
    """What a run of Megatron-LM 0.19 saves: every field of TransformerConfig, and its own names beside."""
    config = model.config
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    own = {
        "padded_vocab_size": gpt["vocab_size"],
        "make_vocab_size_divisible_by": 128,
        "seq_length": gpt["max_sequence_length"],
        "max_position_embeddings": gpt["max_sequence_length"],
        "position_embedding_type": "rope",
        "add_position_embedding": True,
        "rotary_base": gpt["rotary_base"],
        "rotary_percent": gpt["rotary_percent"],
        "use_rope_scaling": gpt.get("rope_scaling", False),
        "rope_scaling_factor": gpt.get("rope_scaling_factor", 8.0),
        "rotary_seq_len_interpolation_factor": None,
        "untie_embeddings_and_output_weights": not gpt["share_embeddings_and_output_weights"],
        "group_query_attention": True,
        "swiglu": config.gated_linear_unit,
        "squared_relu": config.activation_func is squared_relu,
        "num_experts": config.num_moe_experts,
        "world_size": dist.get_world_size(),
        "iteration": 7,
        "consumed_train_samples": 0,
        "ckpt_format": "torch_dist",
        "async_save": False,
        "no_save_optim": True,
        "no_save_rng": None,
    }
    return Namespace(**{key: value for key, value in fields.items() if not callable(value)}, **own)
