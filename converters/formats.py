"""Which format a folder holds, and the Megatron formats opened alike."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ckptbridge.converters.disk import PARTIAL_SUFFIX
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.mcore.fsdp_dtensor_reader import open_fsdp_dtensor
from ckptbridge.converters.mcore.legacy.reader import open_legacy
from ckptbridge.converters.mcore.megatron_folder import MegatronFolder
from ckptbridge.converters.mcore.torch_dist_reader import TRACKER, iteration_folder, open_torch_dist

MegatronFormat = Literal["torch_dist", "torch", "fsdp_dtensor"]
Format = Literal["hf"] | MegatronFormat


def detect_format(path: Path) -> Format:
    """What a folder holds. Raises BadInputError for a missing folder or one without a checkpoint."""
    if not path.exists():
        raise BadInputError(f"{path}: no such folder")
    if not path.is_dir():
        raise BadInputError(f"{path}: expected a folder, found a file")
    if path.name.endswith(PARTIAL_SUFFIX):
        raise BadInputError(f"{path}: a conversion that did not finish; run it again with --resume")
    if _is_megatron(path):
        return _megatron_format(iteration_folder(path))
    if (path / "config.json").exists() or any(path.glob("*.safetensors")):
        return "hf"
    raise BadInputError(
        f"{path}: no checkpoint: expected config.json with *.safetensors (Hugging Face), or {TRACKER} (Megatron)"
    )


def _is_megatron(path: Path) -> bool:
    return any((path / mark).exists() for mark in (TRACKER, ".metadata", "metadata.json")) or _has_ranks(path)


def _has_ranks(folder: Path) -> bool:
    return any(folder.glob("mp_rank_*"))


def _megatron_format(folder: Path) -> MegatronFormat:
    """As Megatron-LM tells them apart: metadata.json is torch_dist's alone, mp_rank folders are legacy."""
    if (folder / "metadata.json").exists():
        return "torch_dist"
    if _has_ranks(folder):
        return "torch"
    return "fsdp_dtensor" if (folder / ".metadata").exists() else "torch_dist"


def open_megatron(path: Path, found: MegatronFormat) -> MegatronFolder:
    """The newest checkpoint under `path`, opened; no tensor is read. Raises BadInputError naming a broken file."""
    folder = iteration_folder(path)
    if found == "torch_dist":
        return open_torch_dist(folder)
    if found == "torch":
        return open_legacy(folder)
    return open_fsdp_dtensor(folder)
