"""Checkpoints of a run in progress: Megatron-Core's torch_dist with the optimizer beside the weights.

The optimizer's tensors lie under `optimizer.state.{param,exp_avg,exp_avg_sq}.<model key>`, cut and stacked like
the weight they belong to: megatron-core's `fully_reshardable` form (core/optimizer/distrib_optimizer.py, 0.19).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ckptbridge.converters.convert import GIGABYTE, config_json
from ckptbridge.converters.copying import Copier
from ckptbridge.converters.disk import sync_folder, take_name, write_file
from ckptbridge.converters.errors import BadInputError, StorageError
from ckptbridge.converters.mapping import Move, check_names_and_shapes
from ckptbridge.converters.mcore.keys import decoder_name
from ckptbridge.converters.mcore.megatron_folder import OPTIMIZER_STATES
from ckptbridge.converters.mcore.optimizer.untrained import has_optimizer_state
from ckptbridge.converters.mcore.torch_dist_reader import TRACKER, iteration_folder, open_torch_dist
from ckptbridge.converters.mcore.torch_dist_writer import TorchDistWriter
from ckptbridge.converters.model import HF_SIDE_FOLDER, Model, decoder_tensors, expert_tensors, open_model
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.tensors import Checkpoint, InMemory, LazyTensor, Zeros, cast

_OWN = frozenset(("args", "checkpoint_version", "content_metadata", "iteration", "ckptbridge"))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingCheckpoint:
    """A saved step of a run: the model, the optimizer's tensors by decoder name, and the run's own items."""

    model: Model
    optimizer: Mapping[str, Checkpoint]
    common: dict[str, Any]
    iteration: int


def save_training_checkpoint(
    root: Path,
    *,
    model: Model,
    iteration: int,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Mapping[str, Tensor]],
    common: Mapping[str, Any],
) -> Path:
    """Write `root/iter_0000123`, then point the tracker at it. Returns the folder.

    `weights` and each of `optimizer`'s states are by decoder name (experts stacked); states are written in fp32, but
    for those of expert biases: the weight is written, and Megatron keeps no state of it.
    `common` holds plain Python values. The folder takes its name when it is whole: a killed save leaves
    `iter_*.partial` only.
    Raises StorageError when the disk fails, BadInputError when the tensors do not fit the model's config.
    """
    if clash := _OWN & set(common):
        raise BadInputError(f"common holds {sorted(clash)}, which the checkpoint writes itself")
    unknown = set(optimizer) - set(OPTIMIZER_STATES)
    if unknown:
        raise BadInputError(f"optimizer holds {sorted(unknown)}; expected {OPTIMIZER_STATES}")
    expected = {decoder_name(m.name): _decoder_shape(m, model.config) for m in model.family.moves(model.config)}
    for label, held in (("weights", weights), *optimizer.items()):
        tensors = {name: InMemory(tensor) for name, tensor in held.items()}
        check_names_and_shapes(expected, tensors, f"{root}: {label}")
    layout = ParallelLayout()
    writer = TorchDistWriter(
        family=model.family,
        config=model.config,
        layout=layout,
        dtype=next(iter(weights.values())).dtype,
        max_file_size=5 * GIGABYTE,
    )
    for state, tensors in (("", weights), *optimizer.items()):
        held = {name: InMemory(tensor) for name, tensor in tensors.items()}
        if state:  # moments that are kept in bf16 lose nothing, and who resumes need not know of them
            held = {name: cast(tensor, torch.float32) for name, tensor in held.items()}
        parameters = expert_tensors(held, model.family, model.config)
        writer.add_model({n: t for n, t in parameters.items() if not state or has_optimizer_state(n)}, state)
    args = writer.args()
    args.iteration = iteration
    plan = writer.plan(
        {"ckptbridge": {"family": model.family.name}, **common},
        args=args,
        iteration=iteration,
        content_metadata={"distrib_optim_sharding_type": "fully_reshardable"} if optimizer else None,
    )
    folder = root / f"iter_{iteration:07d}"
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        copier = Copier(partial, workers=1, max_ram=256 << 20, progress=None, total=0)
        for file in plan.files:
            copier.write(file)
        for name, data in plan.last:
            write_file(partial / name, data)
        sync_folder(partial)
        _write_hf_side(root, model)
        take_name(partial, folder)
        write_file(root / TRACKER, str(iteration).encode())
    except OSError as error:
        raise StorageError(
            f"{error.filename or partial}: {error.strerror}. What was written lies in {partial}"
        ) from error
    return folder


def _decoder_shape(move: Move, config: ModelConfig) -> tuple[int, ...]:
    return move.shape if move.expert is None else (config.num_moe_experts or 0, *move.shape)


def _write_hf_side(root: Path, model: Model) -> None:
    """config.json and tokenizer, so that the run's folder needs nothing else to become a Hugging Face model.

    What lies there of another model, or of weights in another dtype, is replaced; what is the same is left alone.
    """
    side = root / HF_SIDE_FOLDER
    side.mkdir(exist_ok=True)
    copies, made = config_json(model, None)
    copied = ((name, source.read_bytes()) for source, name in (*((a, a.name) for a in model.assets), *copies))
    for name, data in (*copied, *made):
        if not (side / name).exists() or (side / name).read_bytes() != data:
            write_file(side / name, data)


def load_training_checkpoint(path: Path) -> TrainingCheckpoint:
    """Open the newest checkpoint of a run's folder, or one iteration's folder; tensors are read when wanted.

    Raises BadInputError when a file is missing or truncated, or tensors do not fit the config.
    """
    model = open_model(path)
    folder = open_torch_dist(iteration_folder(path))
    optimizer: dict[str, Checkpoint] = {}
    for state in folder.states():
        held = folder.parameters(model.family, model.config, state)
        optimizer[state] = decoder_tensors(_completed(held, model, state), model.config)
    return TrainingCheckpoint(
        model=model,
        optimizer=optimizer,
        common={key: value for key, value in folder.common.items() if key not in _OWN},
        iteration=model.iteration,
    )


def _completed(held: Checkpoint, model: Model, state: str) -> Checkpoint:
    """One state of every weight: what has none in the file is its own main weight, and its moments are zero."""
    return {
        name: held[name] if name in held else _without_state(weight, state) for name, weight in model.tensors.items()
    }


def _without_state(weight: LazyTensor, state: str) -> LazyTensor:
    return cast(weight, torch.float32) if state == "param" else Zeros(weight.shape, torch.float32)
