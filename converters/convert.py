"""The conversion: a plan that knows every byte of the output, then its execution.

Planning reads headers only and refuses bad input before a byte of output exists. Execution writes to
`TARGET.partial`, syncs, and gives the folder its name last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ckptbridge.converters.collection import no_collection
from ckptbridge.converters.copying import sum_nbytes, work_nbytes
from ckptbridge.converters.direct import DIRECT_NBYTES
from ckptbridge.converters.disk import PARTIAL_SUFFIX
from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.fp8_quantise import quantisation_config, quantisation_note, quantised
from ckptbridge.converters.hf_folder import INDEX, SINGLE
from ckptbridge.converters.mapping import check_names_and_shapes, unpacked
from ckptbridge.converters.mcore.bridge_files import BRIDGE_NOTE, bridge_files
from ckptbridge.converters.mcore.legacy.writer import LegacyWriter
from ckptbridge.converters.mcore.megatron_folder import MegatronPlan, MegatronWriter
from ckptbridge.converters.mcore.notes import megatron_notes
from ckptbridge.converters.mcore.torch_dist_reader import TRACKER
from ckptbridge.converters.mcore.torch_dist_writer import TorchDistWriter
from ckptbridge.converters.model import HF_SIDE_FOLDER, Model
from ckptbridge.converters.narrowed import narrowed
from ckptbridge.converters.output import OutputFile
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.pass_through import language_config, safetensors_file, side_file
from ckptbridge.converters.ranks import Rank
from ckptbridge.converters.tensors import Checkpoint, LazyTensor
from ckptbridge.converters.turned import BAND_NBYTES

GIGABYTE = 1_000_000_000
BYTES_PER_SECOND = 1.2e9
START_SECONDS = 1.5
"""For estimates: two cores of a Xeon with the source in the page cache (benchmarks/conversion.py)."""
WrittenFormat = Literal["torch_dist", "torch"]
TargetFormat = Literal["hf"] | WrittenFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """How to convert. Sizes are bytes; `dtype` of None keeps each tensor's own."""

    layout: ParallelLayout = field(default_factory=ParallelLayout)
    dtype: torch.dtype | None = None
    per_layer_keys: bool = False
    target_mcore: tuple[int, int] | None = None
    max_file_size: int = 5 * GIGABYTE
    max_shard_size: int = 5 * GIGABYTE
    max_ram: int = 1 << 30
    workers: int = field(default_factory=lambda: min(4, os.cpu_count() or 1))
    direct_io: bool | None = None
    """Write past the page cache; None does so where that is faster (see direct.py)."""
    resume: bool = False
    overwrite: bool = False
    receipt: Path | None = None
    check_finite: bool = False
    """Refuse a source that holds NaN or infinities; without it they are counted in the receipt."""
    rank: Rank = field(default_factory=Rank)
    """This process among those that share the conversion."""
    legacy_names: str = "te"
    """Format torch: whose modules will load it (see mcore/legacy/names.py)."""
    for_bridge: bool = False
    """Also write what Megatron-Bridge looks for."""
    quantize: Literal["fp8-block"] | None = None
    """Hugging Face output: matrices of linear layers in fp8 with a scale for each block (see fp8_quantise.py)."""

    @property
    def direct_nbytes(self) -> int:
        """What all buffers of direct writes take together, in bytes."""
        return min(DIRECT_NBYTES, self.max_ram // 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionPlan:
    """All that will be written. `files` hold tensors; `small` are files whose bytes are known; `copies` are copied."""

    source: Model
    target: Path
    to: TargetFormat
    options: ConvertOptions
    files: tuple[OutputFile, ...]
    small: tuple[tuple[str, bytes], ...]
    copies: tuple[tuple[Path, str], ...]
    notes: tuple[str, ...]
    reports: tuple[tuple[str, Callable[[], bytes]], ...] = ()
    """Small files that are made when every tensor is written; another run may find other figures."""

    @property
    def nbytes(self) -> int:
        """Tensor bytes that will be written."""
        return sum_nbytes(self.files)

    @property
    def peak_ram(self) -> int:
        """An upper bound of the memory that blocks and rows take, in bytes, beside the interpreter and torch."""
        options = self.options
        direct = 0 if options.direct_io is False else options.direct_nbytes
        kept = BAND_NBYTES if any(row.layout.is_turned for row in self.source.family.params) else 0
        return direct + (4 * work_nbytes(options.max_ram - direct, options.workers) + kept) * options.workers

    def nbytes_by_rank(self) -> dict[str, int]:
        """What each rank of the named layout has files for; empty for Hugging Face, whose files belong to nobody."""
        held: dict[str, int] = {}
        for file in self.files if self.to != "hf" else ():
            if file.name.startswith(f"{HF_SIDE_FOLDER}/"):
                continue
            name = file.name.split("/")[-1 if self.to == "torch_dist" else -2]
            rank = name.split("_")[2] if self.to == "torch_dist" else name
            held[rank] = held.get(rank, 0) + file.size
        return held

    @no_collection()
    def to_json(self) -> dict[str, Any]:
        """The plan for machines: files, every tensor's place, routes, notes."""
        return {
            "source": str(self.source.path),
            "source_format": self.source.format,
            "target": str(self.target),
            "target_format": self.to,
            "family": self.source.family.name,
            "tensors_in": len(self.source.sources),
            "tensors_out": sum(len(file.pieces) for file in self.files),
            "nbytes": self.nbytes,
            "peak_ram": self.peak_ram,
            "estimated_seconds": round(START_SECONDS + self.nbytes / BYTES_PER_SECOND, 1),
            "files": {file.name: file.size for file in self.files},
            "nbytes_by_rank": self.nbytes_by_rank(),
            "tensors": [
                {"name": piece.name, "file": file.name, "offset": piece.offset, "nbytes": piece.tensor.nbytes}
                for file in self.files
                for piece in file.pieces
            ],
            "other_files": [name for name, _ in (*self.small, *self.reports)] + [name for _, name in self.copies],
            "notes": list(self.notes),
            "routes": {move.name: list(move.hf) for move in self.source.family.moves(self.source.config)},
        }


@no_collection()
def plan_conversion(
    source: Model, target: Path, to: TargetFormat, options: ConvertOptions | None = None
) -> ConversionPlan:
    """Everything that a conversion will write, from headers alone.

    Raises BadInputError or NotSupportedError when the model cannot be written so; nothing has been written then.
    """
    options = options or ConvertOptions()
    target = checked_target(target, options)
    expected = {move.name: move.shape for move in source.family.moves(source.config)}
    check_names_and_shapes(expected, source.tensors, str(source.path))
    tensors = cast_all(source.tensors, options.dtype, source.sources)
    try:
        if to == "hf":
            return _plan_hf(source, target, tensors, options)
        return _plan_megatron(source, target, to, tensors, options)
    except BadInputError as error:
        if str(source.path) in str(error):
            raise
        raise type(error)(f"{source.path}: {error}") from error


def checked_target(target: Path, options: ConvertOptions) -> Path:
    """The target, resolved. Raises BadInputError naming an option that is too small, or a target that is no folder."""
    for name in ("max_file_size", "max_shard_size", "max_ram", "workers"):
        if getattr(options, name) < 1:
            raise BadInputError(f"{name} is {getattr(options, name)}: it must be at least 1")
    if not target.resolve().name:
        raise BadInputError(f"{target}: names no folder that could be made")
    if target.name.endswith(PARTIAL_SUFFIX):
        raise BadInputError(f"{target}: the ending {PARTIAL_SUFFIX} means unfinished work; name another folder")
    return target.resolve()  # a link keeps naming the folder, whatever replaces it


def cast_all(tensors: Checkpoint, dtype: torch.dtype | None, sources: Checkpoint | None = None) -> Checkpoint:
    """The tensors in another dtype, but for whole numbers and what has to stay as it is; None keeps each one's own.

    What becomes infinite is told while it is written, by the name that it has among `sources`.
    A bias that only decides which experts are chosen is fp32 in every model that has one: a rounded one chooses others.
    """
    if dtype is None:
        return tensors
    kept = {n for n, t in tensors.items() if n.endswith(".expert_bias") or not t.dtype.is_floating_point}
    return {n: t if n in kept else narrowed(t, dtype, n, sources or {}) for n, t in tensors.items()}


def _plan_hf(source: Model, target: Path, tensors: Checkpoint, options: ConvertOptions) -> ConversionPlan:
    if source.family.no_hf_class:
        raise NotSupportedError(
            f"{source.path}: {source.family.architecture} has no Hugging Face class: {source.family.no_hf_class}. "
            "It can be written for Megatron (upcycle --to mcore), and reshard and verify take it there"
        )
    hf = unpacked(source.family, source.config, tensors)
    quantisation: dict[str, Any] = {}
    notes = source.notes
    if options.quantize is not None:
        hf = quantised(hf, source.family, source.config, str(source.path))
    hf = _with_what_is_beside(hf, source)
    if options.quantize is not None:
        quantisation = quantisation_config(hf)
        notes = (*notes, quantisation_note(hf))
    shards = _shards(hf, options.max_shard_size)
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    files = tuple(safetensors_file(name, shard) for name, shard in zip(names, shards, strict=True))
    small: list[tuple[str, bytes]] = []
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.nbytes for tensor in hf.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        small.append((INDEX, (json.dumps(index, indent=2) + "\n").encode()))
    config_copy, config_file = config_json(source, options.dtype, quantisation)
    return ConversionPlan(
        source=source,
        target=target,
        to="hf",
        options=options,
        files=files,
        small=(*small, *config_file),
        copies=(*((asset, asset.name) for asset in source.assets), *config_copy),
        notes=notes,
    )


def _with_what_is_beside(hf: Mapping[str, LazyTensor], source: Model) -> dict[str, LazyTensor]:
    """The tensors of the whole folder, whose language model has them under these names."""
    start = language_config(source.hf_config)[1] if source.beside else ""
    return {**{start + name: tensor for name, tensor in hf.items()}, **source.beside}


def megatron_writer(source: Model, to: WrittenFormat, options: ConvertOptions) -> MegatronWriter:
    """A writer of a Megatron format for this model. Raises BadInputError when the layout cannot hold the model."""
    options.layout.check(source.config)
    if to == "torch":
        return LegacyWriter(
            family=source.family,
            config=source.config,
            layout=options.layout,
            dtype=options.dtype or source.dtype,
            names=options.legacy_names,
        )
    return TorchDistWriter(
        family=source.family,
        config=source.config,
        layout=options.layout,
        dtype=options.dtype or source.dtype,
        max_file_size=options.max_file_size,
        per_layer_keys=options.per_layer_keys,
        target_mcore=options.target_mcore,
    )


def _plan_megatron(
    source: Model, target: Path, to: WrittenFormat, tensors: Checkpoint, options: ConvertOptions
) -> ConversionPlan:
    writer = megatron_writer(source, to, options)
    writer.add_model(tensors)
    plan = writer.plan({"ckptbridge": {"family": source.family.name}})
    notes = (*source.notes, *megatron_notes(source.config))
    return megatron_conversion(source, target, to, options, plan, iteration=None, notes=notes)


def megatron_conversion(
    source: Model,
    target: Path,
    to: WrittenFormat,
    options: ConvertOptions,
    plan: MegatronPlan,
    *,
    iteration: int | None,
    notes: tuple[str, ...],
) -> ConversionPlan:
    """A Megatron writer's plan with what lies around it: the tracker, config.json and tokenizer.

    The folder is `iter_0000123`, or for an iteration of None `release`, which Megatron loads as weights alone.
    """
    beside: list[tuple[str, bytes]] = []
    if options.for_bridge:
        if to != "torch_dist":
            raise BadInputError(f"--for-bridge: Megatron-Bridge reads torch_dist, not the format {to}")
        iteration = iteration or 0  # it looks for no release
        dtype = options.dtype or source.dtype
        beside = bridge_files(source.config, options.layout, dtype, f"iter_{iteration:07d}", step=iteration)
        notes = (*notes, BRIDGE_NOTE)
    folder, tracker = ("release", b"release") if iteration is None else (f"iter_{iteration:07d}", b"%d" % iteration)
    config_copy, config_file = config_json(source, options.dtype)
    return ConversionPlan(
        source=source,
        target=target,
        to=to,
        options=options,
        files=(
            *(replace(file, name=f"{folder}/{file.name}") for file in plan.files),
            *side_file(source.beside, HF_SIDE_FOLDER),
        ),
        small=(
            *((f"{HF_SIDE_FOLDER}/{name}", data) for name, data in config_file),
            *((f"{folder}/{name}", data) for name, data in plan.last),
            *beside,
            (TRACKER, tracker),
        ),
        copies=tuple(
            (path, f"{HF_SIDE_FOLDER}/{name}")
            for path, name in (*((asset, asset.name) for asset in source.assets), *config_copy)
        ),
        notes=notes,
    )


def config_json(
    source: Model, dtype: torch.dtype | None, more: Mapping[str, Any] | None = None
) -> tuple[list[tuple[Path, str]], list[tuple[str, bytes]]]:
    """config.json as a copy when it is unchanged, as bytes when it had to be made, with `more` fields."""
    if dtype in (None, source.dtype) and source.hf_config_file is not None and not more:
        return [(source.hf_config_file, "config.json")], []
    config = {**source.hf_config, **(more or {})}
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype or source.dtype).removeprefix("torch.")
    return [], [("config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())]


def _shards(tensors: Checkpoint, limit: int) -> list[dict[str, LazyTensor]]:
    """Tensors in order, a new shard when the next one would exceed the size, as `save_pretrained` does."""
    shards: list[dict[str, LazyTensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards
