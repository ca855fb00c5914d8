"""An opened checkpoint of any format: what the model is, and its parameters as lazy tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ckptbridge.converters.blocks import digest_of
from ckptbridge.converters.errors import BadInputError, NotSupportedError, told
from ckptbridge.converters.fields import read_config, write_config
from ckptbridge.converters.fold import folded
from ckptbridge.converters.formats import Format, MegatronFormat, detect_format, open_megatron
from ckptbridge.converters.fp8_folder import dequantised, without_quantisation
from ckptbridge.converters.further_layers import as_saved_by_hf, as_saved_by_megatron, without_copies
from ckptbridge.converters.fused_experts import with_experts_apart
from ckptbridge.converters.hf_folder import HfFolder, find_assets, open_hf_folder, read_json
from ckptbridge.converters.mapping import Family, check_names_and_shapes, packed
from ckptbridge.converters.mcore.agreement import check_agreement
from ckptbridge.converters.mcore.args_reading import config_from_args
from ckptbridge.converters.mcore.keys import decoder_name
from ckptbridge.converters.mcore.megatron_folder import MegatronFolder
from ckptbridge.converters.mcore.run_config import args_of_run_config
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.mxfp4 import without_mxfp4
from ckptbridge.converters.pass_through import language_config, read_side_file, set_apart
from ckptbridge.converters.registry import family_named, family_of, family_that_expresses
from ckptbridge.converters.tensors import Checkpoint, Computed, LazyTensor, Stored

if TYPE_CHECKING:
    from ckptbridge.converters.hub.shards import HubShards

_MOST_ITERATIONS = 10**9
HF_SIDE_FOLDER = "hf"
"""Beside the weights of a Megatron checkpoint: config.json and tokenizer, also for --tokenizer-model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A checkpoint of which only headers were read.

    `tensors` are named as Megatron-Core names its parameters, with layer and expert numbers; `sources` are the
    same bytes as the files hold them, for digests.
    """

    path: Path
    format: Format
    family: Family
    config: ModelConfig
    tensors: Checkpoint
    sources: Checkpoint
    dtype: torch.dtype
    hf_config: dict[str, Any]
    hf_config_file: Path | None
    """The file that `hf_config` is, byte for byte, if it is one."""
    assets: tuple[Path, ...]
    iteration: int = 0
    saved: MegatronFolder | None = None
    """The Megatron checkpoint itself, with all that stands beside the weights; None for Hugging Face."""
    notes: tuple[str, ...] = ()
    remote: HubShards | None = None
    """Where the shards come from while they are converted; None when all of them are here."""
    beside: Checkpoint = field(default_factory=dict[str, LazyTensor])
    """Hugging Face tensors that are no part of the language model, by their names there."""
    derivation: str = ""
    """What was done to the checkpoint at `path`, if it was not taken as it is: two runs with one text do the same."""
    made_of: tuple[Model, ...] = ()
    """The opened checkpoints that this one is a view over, if it is one; the first lies at `path`."""

    @property
    def opened(self) -> tuple[Model, ...]:
        """The checkpoints whose files are read."""
        return self.made_of or (self,)


def open_model(
    path: Path,
    *,
    hf_config: Path | None = None,
    ignore_config_fields: Iterable[str] = (),
    pass_through: Sequence[str] = (),
) -> Model:
    """Open a Hugging Face or Megatron-Core checkpoint and check its names and shapes against its config.

    `hf_config` is a config.json (or its folder) for a Megatron checkpoint that has none beside it. Tensors of a
    Hugging Face folder whose names begin with one of `pass_through` are not looked at (see pass_through.py).
    Raises BadInputError or NotSupportedError naming file and tensor; nothing but headers is read.
    """
    found = detect_format(path)
    try:
        if found == "hf":
            return model_of_folder(open_hf_folder(path), ignore_config_fields, pass_through)
        return _open_megatron(path, found, hf_config, ignore_config_fields)
    except BadInputError as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error


def model_of_folder(folder: HfFolder, ignore: Iterable[str] = (), pass_through: Sequence[str] = ()) -> Model:
    """The model of an opened Hugging Face folder, its names and shapes checked. Raises as `open_model` does."""
    path, ignore, whole_config = folder.path, tuple(ignore), folder.config
    stored, beside = set_apart(folder, pass_through)
    where = str(path / "config.json")
    folder = dequantised(without_mxfp4(stored, ignore), ignore)
    family = family_of(folder.config, where)
    config, missing = as_saved_by_hf(read_config(family.fields, folder.config, where, ignore), folder.tensors)
    expected = {n: s for m in family.moves(config) for n, s in zip(m.hf, m.hf_shapes, strict=True)}
    ignored = {name.format(layer=layer) for name in family.ignored for layer in range(config.num_layers)}
    notes = [*folder.notes, *missing]
    dropped = set(family.copied(config))
    if absent := [name for name in family.copied(config) if name not in folder.tensors]:
        notes.append(
            f"{', '.join(folded(absent))} are not there; published models have them, and they are written back"
        )
    found = with_experts_apart(without_copies(folder.tensors, family, config, str(path)), family, config, str(path))
    if "lm_head.weight" in found and "lm_head.weight" not in expected:
        notes.append(_drop_tied_head(path, found))
        dropped.add("lm_head.weight")
    check_names_and_shapes(expected, found, str(path), ignored)
    hf = {name: tensor for name, tensor in found.items() if name not in ignored}
    sources = {name: tensor for name, tensor in stored.tensors.items() if name not in ignored and name not in dropped}
    _refuse_quantised(folder.tensors)
    return Model(
        path=path,
        format="hf",
        family=family,
        config=config,
        tensors=packed(family, config, hf, _file_of(path, sources)),
        sources={**sources, **beside},
        dtype=_main_dtype(hf.values()),
        hf_config=whole_config if folder is stored else without_quantisation(whole_config),
        beside=beside,
        hf_config_file=path / "config.json" if folder is stored else None,
        assets=folder.assets,
        notes=tuple(notes),
    )


def _refuse_quantised(tensors: Checkpoint) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype.itemsize == 1 and isinstance(tensor, Stored):
            raise NotSupportedError(
                f"{tensor.path}: tensor {name!r} is {tensor.dtype}; quantised weights other than fp8 in blocks are not "
                "supported, take the model's bf16 files"
            )


def _file_of(path: Path, tensors: Checkpoint) -> str:
    """The file that holds the tensors, or the folder when there are several."""
    files = {tensor.path for tensor in tensors.values() if isinstance(tensor, Stored)}
    return str(files.pop() if len(files) == 1 else path)


def _drop_tied_head(path: Path, found: dict[str, LazyTensor]) -> str:
    head, embedding = found.pop("lm_head.weight"), found.get("model.embed_tokens.weight")
    if embedding is None or head.shape != embedding.shape or digest_of(head) != digest_of(embedding):
        raise BadInputError(
            f"{path}: tie_word_embeddings is true in config.json, but lm_head.weight differs from "
            "model.embed_tokens.weight; transformers would ignore it. Set tie_word_embeddings to false or "
            "remove the tensor"
        )
    return "lm_head.weight is a copy of the tied embedding: it is not carried over"


def _open_megatron(path: Path, found: MegatronFormat, hf_config: Path | None, ignore: Iterable[str]) -> Model:
    folder = open_megatron(path, found)
    hf_file = _hf_config_file(path, folder.path, hf_config)
    beside = read_side_file(hf_file)
    args, where = folder.args or args_of_run_config(folder.path, needed=hf_file is None), str(folder.path)
    if hf_file is not None:
        raw = read_json(hf_file)
        own = language_config(raw)[0] if beside else raw
        family = family_of(own, str(hf_file))
        config = as_saved_by_megatron(read_config(family.fields, own, str(hf_file), ignore), folder.sources())
        if args is not None:
            named_vocab = (getattr(args, "vocab_size", None), getattr(args, "padded_vocab_size", None))
            check_agreement(config, config_from_args(args, where), str(hf_file), where, named_vocab)
    elif args is not None:
        config = config_from_args(args, where)
        known: Any = folder.common.get("ckptbridge")
        named: Any = known.get("family") if isinstance(known, dict) else None  # pyright: ignore
        family = family_named(named, where) if isinstance(named, str) else family_that_expresses(config, where)
        raw = {
            "architectures": [family.architecture],
            "model_type": family.name,
            **write_config(family.fields, config),
        }
    else:
        raise BadInputError(f"{where}: holds no args that describe the model; give its config.json with --hf-config")
    tensors = folder.parameters(family, config)
    dtype = _main_dtype(tensors.values())
    if hf_file is None:
        raw["dtype"] = str(dtype).removeprefix("torch.")
    iteration = folder.common.get("iteration", 0)
    if isinstance(iteration, int) and not 0 <= iteration < _MOST_ITERATIONS:
        raise BadInputError(f"{where}: its iteration is {told(iteration)}, which no folder is named after")
    return Model(
        path=path,
        format=found,
        family=family,
        config=config,
        tensors=tensors,
        sources={**folder.sources(), **beside},
        beside=beside,
        dtype=dtype,
        hf_config=raw,
        hf_config_file=hf_file,
        assets=find_assets(hf_file.parent) if hf_file else (),
        iteration=iteration if isinstance(iteration, int) else 0,
        saved=folder,
    )


def _hf_config_file(path: Path, folder: Path, given: Path | None) -> Path | None:
    if given is not None:
        file = given / "config.json" if given.is_dir() else given
        if not file.is_file():
            raise BadInputError(f"{file}: --hf-config names no file")
        return file
    candidates = (path / HF_SIDE_FOLDER, folder / HF_SIDE_FOLDER, folder.parent / HF_SIDE_FOLDER)
    return next((c / "config.json" for c in candidates if (c / "config.json").is_file()), None)


def decoder_tensors(tensors: Checkpoint, config: ModelConfig) -> Checkpoint:
    """The same parameters as the decoder holds them: the experts of a layer stacked on dim 0."""
    stacked: dict[str, list[LazyTensor]] = {}
    for name, tensor in tensors.items():
        stacked.setdefault(decoder_name(name), []).append(tensor)
    return {name: _stack(parts) if ".experts.experts." in name else parts[0] for name, parts in stacked.items()}


def expert_tensors(stacked: Checkpoint, family: Family, config: ModelConfig) -> Checkpoint:
    """The inverse of `decoder_tensors`: one name an expert."""
    tensors: dict[str, LazyTensor] = {}
    for move in family.moves(config):
        whole = stacked[decoder_name(move.name)]
        tensors[move.name] = whole if move.expert is None else _entry(whole, move.expert)
    return tensors


def _stack(parts: list[LazyTensor]) -> LazyTensor:
    return Computed(
        (len(parts), *parts[0].shape),
        parts[0].dtype,
        lambda start, stop: torch.stack([part.read() for part in parts[start:stop]]),
        work_row_nbytes=2 * parts[0].nbytes,
    )


def _entry(whole: LazyTensor, index: int) -> LazyTensor:
    return Computed(whole.shape[1:], whole.dtype, lambda start, stop: whole.read_rows(index, index + 1)[0, start:stop])


def _main_dtype(tensors: Iterable[LazyTensor]) -> torch.dtype:
    """The dtype that holds most bytes."""
    nbytes: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        nbytes[tensor.dtype] += tensor.nbytes
    return nbytes.most_common(1)[0][0]


def count_parameters(tensors: Mapping[str, LazyTensor], config: ModelConfig) -> tuple[int, int]:
    """(all parameters, those that a token meets: top-k of the experts)."""
    total = active = 0
    for name, tensor in tensors.items():
        count = tensor.nbytes // tensor.dtype.itemsize
        total += count
        share = config.moe_router_topk / (config.num_moe_experts or 1) if ".experts.experts." in name else 1.0
        active += round(count * share)
    return total, active
