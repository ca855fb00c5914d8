"""Folders that torch.distributed.checkpoint wrote for Megatron-FSDP (`fsdp_dtensor`), and for torch's own FSDP.

Format: Megatron-LM with megatron-core 0.14 to 0.19, `--ckpt-format fsdp_dtensor` (core/transformer/
fsdp_dtensor_checkpoint.py). The same `.metadata` and `.distcp` files as torch_dist, but no metadata.json; keys are
those of the modules' state dicts, `model.module.decoder.layers.3...`, every layer and expert under its own, a gated
linear_fc1 as `weight_w` (gate_proj) and `weight_v` (up_proj), and Adam's moments under `optimizer.state`. (0.14 and
0.15 count the experts of every expert-parallel rank from 0, so that only the last rank's are there: they are missed.)
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.fold import folded
from ckptbridge.converters.layout import GATED
from ckptbridge.converters.mapping import Family, Move
from ckptbridge.converters.mcore.legacy.names import spelled
from ckptbridge.converters.mcore.megatron_folder import OPTIMIZER_STATES
from ckptbridge.converters.mcore.optimizer.untrained import has_optimizer_state
from ckptbridge.converters.mcore.parameters import padding_multiple
from ckptbridge.converters.mcore.torch_dist_reader import TorchDistFolder, open_distributed
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.tensors import Checkpoint, LazyTensor, join_rows, rows

_MODEL = re.compile(r"model\.(?:module\.)*(.+)")
_MODEL_CHUNK = re.compile(r"model\d+\.")
_OPTIMIZER = re.compile(r"optimizer\.(?:\d+\.)?state\.(?:module\.)*(.+)\.(exp_avg|exp_avg_sq)")
_HALF = re.compile(r"(.*\blinear_fc1\.(?:weight|bias)\d*)_([wv])")
_COMMON = re.compile(
    r"args|iteration|checkpoint_version|num_floating_point_operations_so_far|opt_param_scheduler\.[^.]+"
)


Held = Mapping[str, str]
"""The keys that hold a parameter: one under "", or gate_proj under "w" and up_proj under "v"."""


@dataclass(frozen=True, slots=True)
class FsdpDtensorFolder:
    """An opened checkpoint: the tensors and objects as torch names them, and what was saved beside them."""

    saved: TorchDistFolder
    common: Mapping[str, Any]

    @property
    def path(self) -> Path:
        return self.saved.path

    @property
    def args(self) -> Namespace | None:
        args = self.common.get("args")
        return args if isinstance(args, Namespace) else None

    def states(self) -> tuple[str, ...]:
        """Adam's moments if they are there; Megatron-FSDP then saves its fp32 main weights as the model's."""
        moments = {hit[2] for key in self.saved.tensors if (hit := _OPTIMIZER.fullmatch(key))}
        if moments and all(self.saved.tensors[key].dtype == torch.float32 for key in self._model()):
            moments.add("param")
        return tuple(state for state in OPTIMIZER_STATES if state in moments)

    def parameters(self, family: Family, config: ModelConfig, state: str = "") -> dict[str, LazyTensor]:
        """One state of every parameter, unsplit: see MegatronFolder."""
        moves = {move.name: move for move in family.moves(config)}
        found: dict[str, dict[str, str]] = {}
        unexpected: list[str] = []
        for key, name in self._keys(state):
            half = _HALF.fullmatch(name)
            parameter = _parameter(half[1] if half else name, moves)
            if parameter is None:
                unexpected.append(key)
                continue
            if state and not has_optimizer_state(parameter):
                continue
            held, part = found.setdefault(parameter, {}), half[2] if half else ""
            if part in held:
                raise BadInputError(f"{self.path}: {held[part]} and {key} are both {parameter}")
            held[part] = key
        wanted = [name for name in moves if not state or has_optimizer_state(name)]
        missing = [name for name in wanted if name not in found]
        tensors: dict[str, LazyTensor] = {}
        wrong: list[str] = []
        for name, held in found.items():
            whole = self._joined(moves[name], held)
            fitting = self._fitting(moves[name], whole)
            if fitting is None:
                keys, expected = ", ".join(held.values()), list(moves[name].shape)
                wrong.append(f"  {keys}: expected shape {expected} from the config, found {list(whole.shape)}")
            else:
                tensors[name] = fitting
        if missing or unexpected or wrong:
            lines = [f"{self.path}: the tensors do not fit the config, so nothing was written"]
            lines += [f"  {len(missing)} missing: {', '.join(folded(missing)[:12])}"] if missing else []
            lines += [f"  {len(unexpected)} unexpected: {', '.join(folded(unexpected)[:12])}"] if unexpected else []
            raise BadInputError("\n".join([*lines, *wrong[:12]]))
        return {name: tensors[name] for name in wanted}

    def sources(self) -> Checkpoint:
        """The weights' chunks as the files hold them, named key@offsets."""
        return {
            f"{key}@{','.join(map(str, chunk.offsets))}": self.saved.tensors[key].saved(chunk)
            for key in self._model()
            for chunk in self.saved.tensors[key].chunks
        }

    def _model(self) -> Iterator[str]:
        return (key for key in self.saved.tensors if _MODEL.fullmatch(key))

    def _keys(self, state: str) -> Iterator[tuple[str, str]]:
        """(key, name in the module) of every tensor of one state."""
        for key in self.saved.tensors:
            if state in ("", "param"):
                hit = _MODEL.fullmatch(key)
            else:
                hit = _OPTIMIZER.fullmatch(key)
                hit = hit if hit and hit[2] == state else None
            if hit and spelled(hit[1]) is not None:
                yield key, hit[1]

    def _joined(self, move: Move, held: Held) -> LazyTensor:
        """The whole parameter. Raises BadInputError when a half is missing, or is no half."""
        where, tensors = str(self.path), self.saved.tensors
        if "" in held:
            if len(held) > 1:
                raise BadInputError(f"{where}: {move.name} is there whole and in halves: {sorted(held.values())}")
            if move.layout.name == GATED.name and self._tensor_parallel() != 1:
                raise NotSupportedError(
                    f"{where}: {held['']} holds gate_proj and up_proj of every tensor-parallel rank in turn, as "
                    "--ckpt-format torch_dcp writes them; it is read where args say a tensor parallel size of 1"
                )
            return tensors[held[""]].part(())
        gate, up = (held.get(part) for part in "wv")
        if gate is None or up is None:
            raise BadInputError(f"{where}: {gate or up} is there without its other half ({'_v' if gate else '_w'})")
        if tensors[gate].shape != tensors[up].shape:
            raise BadInputError(
                f"{where}: {gate} has shape {list(tensors[gate].shape)}, but {up} has {list(tensors[up].shape)}"
            )
        return join_rows([tensors[gate].part(()), tensors[up].part(())])

    def _fitting(self, move: Move, whole: LazyTensor) -> LazyTensor | None:
        """The parameter without padding; None when its shape is another than the config's."""
        if tuple(whole.shape) == move.shape:
            return whole
        extra = whole.shape[0] - move.shape[0] if tuple(whole.shape[1:]) == move.shape[1:] else -1
        if move.layout.is_vocab and 0 <= extra < padding_multiple(self.args):
            return rows(whole, 0, move.shape[0])
        return None

    def _tensor_parallel(self) -> Any:
        return getattr(self.args, "tensor_model_parallel_size", None)


def _parameter(name: str, moves: Mapping[str, Move]) -> str | None:
    """The parameter that a module's key means, of those that the model has."""
    meaning = spelled(name)
    if meaning is None:
        return None
    numbers = {"{layer}": str(meaning.layer), "{expert}": str(meaning.expert)}
    for candidate in meaning.candidates:
        for placeholder, number in numbers.items():  # no str.format: a key of a hostile file may hold any brace
            candidate = candidate.replace(placeholder, number)
        if candidate in moves:
            return candidate
    return None


def open_fsdp_dtensor(folder: Path) -> FsdpDtensorFolder:
    """Open one iteration's folder. Reads `.metadata` and the objects beside the tensors, no tensor.

    Raises BadInputError when a file is missing or shorter than the metadata says, NotSupportedError for a checkpoint
    whose keys do not tell its layers apart.
    """
    saved = open_distributed(folder)
    if any(_MODEL_CHUNK.match(key) for key in saved.tensors):
        raise NotSupportedError(f"{folder}: holds the model in chunks (model0, model1, ...), as virtual pipelines do")
    if not any(_MODEL.fullmatch(key) for key in saved.tensors):
        raise BadInputError(
            f"{folder}: metadata.json is missing: Megatron writes it last, so this checkpoint is incomplete "
            "(in a checkpoint of Megatron-FSDP, which has none, keys begin with 'model.')"
        )
    try:
        beside = {key: saved.load_object(key) for key in saved.objects if _COMMON.fullmatch(key)}
    except (AttributeError, TypeError, ValueError) as error:
        raise BadInputError(f"{folder / '.metadata'}: an entry is not what its place asks for: {error}") from error
    opened = FsdpDtensorFolder(saved, _nested(beside))
    stages: Any = getattr(opened.args, "pipeline_model_parallel_size", None)
    if stages not in (None, 1):
        raise NotSupportedError(
            f"{folder}: was saved with a pipeline parallel size of {stages}: every stage counts its layers from 0, so "
            "their keys are the same"
        )
    return opened


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """torch's planner gives every entry of a dictionary a key of its own: `opt_param_scheduler.max_lr`."""
    common: dict[str, Any] = {}
    for key, value in flat.items():
        outer, dot, inner = key.partition(".")
        if dot:
            common.setdefault(outer, {})[inner] = value
        else:
            common[key] = value
    return common
