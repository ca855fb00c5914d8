"""What a checkpoint holds of the layers that predict further tokens, against what its config says.

Published files have them, and beside them copies of the embedding and the output layer; what transformers saved has
neither, though config.json still counts them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.mapping import MTP, Family
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.tensors import Checkpoint, LazyTensor

_WHOLE_NBYTES = 1 << 20
"""Copies up to this size are compared whole, larger ones at their beginning, middle and end."""
_SPOT_NBYTES = 1 << 16


def as_saved_by_hf(config: ModelConfig, names: Iterable[str]) -> tuple[ModelConfig, tuple[str, ...]]:
    """The config of a Hugging Face folder with these tensors, and a note where it counts layers that are not there."""
    behind = f"model.layers.{config.num_layers}."
    if not config.mtp_num_layers or any(name.startswith(behind) for name in names):
        return config, ()
    told = f"config.json counts layers that predict further tokens ({config.mtp_num_layers}), which are not there: "
    return replace(config, mtp_num_layers=0), (f"{told}the model is converted without them",)


def as_saved_by_megatron(config: ModelConfig, keys: Iterable[str]) -> ModelConfig:
    """The config of a Megatron checkpoint with these keys, whose config.json may count layers that are not there."""
    if not config.mtp_num_layers or any(MTP in key for key in keys):
        return config
    return replace(config, mtp_num_layers=0)


def without_copies(found: Checkpoint, family: Family, config: ModelConfig, where: str) -> Checkpoint:
    """The tensors without those that repeat another. Raises BadInputError for a copy that differs from its original.

    Of tensors whose files are not here only the form is compared.
    """
    copied = family.copied(config)
    for name in (name for name in copied if name in found and copied[name] in found):
        copy, original = found[name], found[copied[name]]
        is_alike = copy.shape == original.shape and copy.dtype == original.dtype
        if not is_alike or (_is_here(copy) and _is_here(original) and not _is_equal(copy, original)):
            raise BadInputError(
                f"{where}: {name} differs from {copied[name]}, whose copy it is in published models; Megatron has room "
                "for one of them. Make them equal, or remove the copy"
            )
    return {name: tensor for name, tensor in found.items() if name not in copied}


def _is_here(tensor: LazyTensor) -> bool:
    path: Path | None = getattr(tensor, "path", None)
    return path is None or path.exists()


def _is_equal(one: LazyTensor, other: LazyTensor) -> bool:
    rows = one.shape[0]
    if one.nbytes <= _WHOLE_NBYTES:
        spots = [(0, rows)]
    else:
        height = max(1, _SPOT_NBYTES // one.row_nbytes)
        spots = [(at, at + height) for at in (0, (rows - height) // 2, rows - height)]
    return all(
        torch.equal(one.read_rows(*spot).view(torch.uint8), other.read_rows(*spot).view(torch.uint8)) for spot in spots
    )
