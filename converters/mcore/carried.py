"""What stands beside the tensors of a Megatron checkpoint, carried to another one: arguments, scheduler, random states.

What depends on a layout is carried only where the layout stays; whatever is not carried is told.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptbridge.converters.fold import folded
from ckptbridge.converters.inert_pickles import is_faithful
from ckptbridge.converters.mcore.optimizer.settings import OptimizerKind
from ckptbridge.converters.mcore.parameters import is_optimizer_key
from ckptbridge.converters.mcore.torch_dist_reader import COMMON_KEY, TorchDistFolder
from ckptbridge.converters.parallel_layout import ParallelLayout

_WRITTEN_ANEW = re.compile(
    r"args|checkpoint_version|content_metadata|iteration|ckptbridge|optimizer|rng_state|rerun_state_machine|model\d*"
)
_FROM_LAYOUT = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"),
    *("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"),
    *("expert_model_parallel_size", "expert_tensor_parallel_size"),
    *("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers", "padded_vocab_size", "ckpt_format"),
)
_FROM_DTYPE = ("params_dtype", "bf16", "fp16")
_OTHER_SPLITS = (
    "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)
_RANDOM = re.compile(r"rng_state/shard_\d+\.\d+_(\d+)\.(\d+)")
_RERUN = "rerun_state_machine_state/"
_LARGEST_EMPTY_STATE = 4096
"""A module's extra state that holds nothing is an archive of some 1300 bytes."""


@dataclass(slots=True, kw_only=True)
class Carried:
    """`common` are the items, `objects` the keys of objects that stay as they are."""

    common: dict[str, Any] = field(default_factory=dict[str, Any])
    objects: list[str] = field(default_factory=list[str])
    random_states: bool = False
    notes: list[str] = field(default_factory=list[str])


def carried_items(common: Mapping[str, Any]) -> Carried:
    """The items of a checkpoint's common state that fit every layout."""
    kept = Carried()
    lost: list[str] = []
    for key, value in common.items():
        if _WRITTEN_ANEW.fullmatch(str(key)):
            continue
        if is_faithful(value):
            kept.common[key] = value
        else:
            lost.append(str(key))
    if lost:
        kept.notes.append(
            f"not carried: {', '.join(lost)}, which hold objects of classes that this program does not import"
        )
    return kept


def carry_objects(kept: Carried, folder: TorchDistFolder, layout: ParallelLayout) -> None:
    """Add the objects of a torch_dist checkpoint that fit a torch_dist checkpoint for this layout."""
    source = folder.args
    stays = (_size(source, "tensor"), _size(source, "pipeline")) == (layout.tp, layout.pp)
    lost: list[str] = []
    scales = 0
    for key, info in folder.objects.items():
        if key == COMMON_KEY or is_optimizer_key(key):
            continue
        if "_extra_state" in key:
            scales += info.length > _LARGEST_EMPTY_STATE
        elif hit := _RANDOM.fullmatch(key):
            if (int(hit[1]), int(hit[2])) == (layout.pp, layout.tp):
                kept.objects.append(key)
                kept.random_states = True
        elif key.startswith(_RERUN):
            if stays:
                kept.objects.append(key)
        elif key.endswith("/shard_0_1"):
            kept.objects.append(key)
        else:
            lost.append(key)
    rerun = folder.common.get("rerun_state_machine")
    if rerun is not None and stays and is_faithful(rerun):
        kept.common["rerun_state_machine"] = rerun
    elif rerun is not None:
        kept.notes.append("not carried: rerun_state_machine, which belongs to the layout that saved it")
    if lost:
        kept.notes.append(f"not carried: {len(lost)} objects cut for another layout: {', '.join(folded(lost)[:8])}")
    if scales:
        kept.notes.append(f"not carried: the extra state of {scales} modules (Transformer Engine's fp8 scales)")


def note_random_states(kept: Carried, had_some: bool, *, legacy: bool) -> None:
    """Say what a run needs to be told when it cannot go on with the same random numbers."""
    if kept.random_states or not had_some:
        return
    flag = ": pass --no-load-rng" if legacy else ""
    kept.notes.append(f"not carried: the random states, which belong to the layout and format that saved them{flag}")


def carried_args(
    saved: Namespace | None,
    made: Namespace,
    *,
    layout: ParallelLayout,
    iteration: int,
    optimizer: OptimizerKind | None,
    random_states: bool,
    data_parallel_size: int,
    new_dtype: bool,
) -> tuple[Namespace, list[str]]:
    """The run's arguments with those of the new layout, and notes. `made` describe the model and the layout alone."""
    known = {} if saved is None else vars(saved)
    values = {name: value for name, value in known.items() if is_faithful(value)}
    lost = sorted(known.keys() - values.keys())
    fresh = dict(vars(made))
    values = fresh | values
    for name in (*_FROM_LAYOUT, *(_FROM_DTYPE if new_dtype else ())):
        if name in fresh or name in known:
            values[name] = fresh.get(name)
    values |= {name: None if name == _OTHER_SPLITS[0] else False for name in _OTHER_SPLITS if name in known}
    moved = saved is None or (_size(saved, "tensor"), _size(saved, "pipeline")) != (layout.tp, layout.pp)
    if moved:
        values |= {
            "data_parallel_size": data_parallel_size,
            "world_size": layout.tp * layout.pp * data_parallel_size * int(values.get("context_parallel_size") or 1),
        }
    values |= {
        "iteration": iteration,
        "no_save_optim": None if optimizer else True,
        "no_save_rng": None if random_states else True,
    }
    if optimizer is not None:
        values["use_distributed_optimizer"] = optimizer != "plain"
        values["dist_ckpt_optim_fully_reshardable"] = optimizer == "fully_reshardable"
    notes = [f"not carried: args.{', args.'.join(lost)}, of classes that this program does not import"] if lost else []
    return Namespace(**values), notes


def _size(args: Namespace | None, axis: str) -> int:
    value = getattr(args, f"{axis}_model_parallel_size", 1)
    return value if isinstance(value, int) else 1
