"""What a spoiled checkpoint holds, by other readers than the converter's.

Hugging Face's files by safetensors and torch.load with weights only, Megatron's by plain unpickling (of harmless
globals) and the packing written out in naive.py and legacy_naive.py.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import pickletools
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ckptbridge.converters.model import Model
from tests.converters import naive
from tests.converters.fp8_models import meant
from tests.converters.legacy_naive import Ranks, rank_models

Tensors = Mapping[str, Tensor]


def differences(model: Model, folder: Path, read: Path, found: Tensors, config: Mapping[str, Any]) -> str:
    """How the tensors of a conversion's result differ from those of `read`; "" when they do not.

    `folder` is what `model` was opened from: `read` itself, or a healed copy of it.
    Raises whatever the other readers raise when they cannot read the source.
    """
    if model.format == "hf":
        expected = _hugging_face(read, set(found))
        if "quantization_config" in model.hf_config or any(t.dtype.itemsize == 1 for t in model.sources.values()):
            expected, found = _with_one_nan(expected), _with_one_nan(found)
        return difference(expected, found)
    where = read / model.saved.path.relative_to(folder) if model.saved else read
    if model.format == "torch":
        return _legacy_difference(where, model.family.name, found, config)
    expected = _distributed(where, config["vocab_size"])
    if model.format == "fsdp_dtensor":
        return difference(expected, as_fsdp(found, config))
    made = naive.megatron_tensors(found, config)
    if not any(key.startswith("decoder.layers.0.") for key in expected):
        made = naive.stacked(made, config["num_hidden_layers"])
    return difference(expected, made)


def heal(folder: Path, sound: Mapping[str, bytes], healed: Path) -> None:
    """A copy of a spoiled folder whose archives are the sound ones with the spoiled tensors' bytes."""
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        name = str(path.relative_to(folder))
        data, old = path.read_bytes(), sound.get(name, b"")
        if name.endswith((".bin", ".pt", ".distcp", ".metadata", ".safetensors")):
            made = bytearray(old)
            for start, stop in _tensor_bytes(old) if len(data) == len(old) else ():
                made[start:stop] = data[start:stop]
            data = bytes(made)
        (healed / name).parent.mkdir(parents=True, exist_ok=True)
        (healed / name).write_bytes(data)


def _tensor_bytes(data: bytes) -> list[tuple[int, int]]:
    """Where the storages of all archives in a sound file lie."""
    found: list[tuple[int, int]] = []
    at = data.find(b"PK\x03\x04")
    while at >= 0:
        size, name, extra = struct.unpack_from("<IHH", data, at + 22)
        start = at + 30 + name + extra
        if b"/data/" in data[at + 30 : at + 30 + name]:
            # torch's writer tells an entry's size behind its data only.
            found.append((start, start + size if 0 < size < 0xFFFFFFFF else _next_record(data, start)))
        at = data.find(b"PK\x03\x04", at + 4)
    return found


def _next_record(data: bytes, start: int) -> int:
    places = (data.find(signature, start) for signature in (b"PK\x03\x04", b"PK\x07\x08", b"PK\x01\x02"))
    return min(place for place in places if place >= 0)


def difference(expected: Tensors, found: Tensors) -> str:
    """The first name, shape, dtype or byte that differs, in words."""
    if strange := expected.keys() ^ found.keys():
        return f"names differ: {sorted(strange)[:5]}"
    for name, tensor in expected.items():
        if tensor.dtype != found[name].dtype or tensor.shape != found[name].shape or _raw(tensor) != _raw(found[name]):
            told = f"{found[name].dtype} {list(found[name].shape)}"
            return f"{name}: expected {tensor.dtype} {list(tensor.shape)}, found {told}"
    return ""


def _with_one_nan(tensors: Tensors) -> dict[str, Tensor]:
    """Computed weights: which of the many bit patterns of a NaN comes out is the processor's choice."""
    return {name: tensor.where(~tensor.isnan(), torch.nan) for name, tensor in tensors.items()}


def loaded(data: bytes) -> Any:
    """torch.load with weights only. An entry that is marked as a folder is none: torch would give random memory."""
    made = bytearray(data)
    at = made.find(b"PK\x01\x02")
    while at >= 0:
        made[at + 38 : at + 42] = bytes(4)
        at = made.find(b"PK\x01\x02", at + 4)
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(io.BytesIO(made), weights_only=True)


def _raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _hugging_face(folder: Path, wanted: set[str]) -> dict[str, Tensor]:
    """The tensors of a folder; a copy of a tied head, and frequencies of the rope, may be left out."""
    index = next((folder / n for n in ("model.safetensors.index.json",) if (folder / n).exists()), None)
    if index is None and (folder / "model.safetensors").exists():
        files = [folder / "model.safetensors"]
    else:
        index = index or next(iter(folder.glob("pytorch_model.bin.index.json")), None)
        names = set(json.loads(index.read_text())["weight_map"].values()) if index else {"pytorch_model.bin"}
        files = sorted(folder / name for name in names)
    held: dict[str, Tensor] = {}
    for file in files:
        held |= load_file(file) if file.suffix == ".safetensors" else loaded(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    block = (config.get("quantization_config") or {}).get("weight_block_size")
    dtype = getattr(torch, config.get("dtype") or "bfloat16") if block else None
    made: dict[str, Tensor] = {}
    for name, tensor in held.items():
        scales = held.get(f"{name}_scale_inv")
        if name in wanted or not ("rotary_emb" in name or name.endswith("_scale_inv")):
            made[name] = tensor if scales is None else meant(tensor, scales, tuple(block), dtype or torch.bfloat16)
    return made


_HARMLESS = ("torch", "torch.distributed.checkpoint", "collections", "argparse", "builtins set", "_codecs")


_MEMO = 1 << 20
"""Python fills all places of the memo up to the one that is named: 10**10 of them end the process where the system
promises memory that it does not have, and raise MemoryError elsewhere."""


def _distributed(folder: Path, vocab_size: int) -> dict[str, Tensor]:
    """The global tensors of a torch_dist or fsdp_dtensor folder, the vocabulary without padding."""
    raw = (folder / ".metadata").read_bytes()
    for opcode, argument, _ in pickletools.genops(raw):
        if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST") and not str(argument or "torch").startswith(_HARMLESS):
            raise ValueError(f".metadata asks for {argument}")
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > _MEMO:
            raise ValueError(f".metadata asks for a memo of {argument} places")
    metadata = pickle.loads(raw)  # every global in it is one of the harmless
    made: dict[str, Tensor] = {}
    for key, entry in metadata.state_dict_metadata.items():
        if not hasattr(entry, "chunks") or key.startswith("optimizer."):
            continue
        whole = torch.empty(tuple(entry.size), dtype=entry.properties.dtype)
        for index, info in metadata.storage_data.items():
            if index.fqn == key:
                blob = (folder / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
                chunk = loaded(blob)
                whole[tuple(slice(o, o + n) for o, n in zip(index.offset, chunk.shape, strict=True))] = chunk
        is_vocab = key.endswith(("word_embeddings.weight", "output_layer.weight"))
        made[key] = whole[:vocab_size] if is_vocab else whole
    return made


def as_fsdp(hf: Tensors, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Hugging Face's tensors under the keys of Megatron-FSDP: experts and the halves of linear_fc1 apart."""
    made: dict[str, Tensor] = {}
    for name, tensor in naive.megatron_tensors(hf, config).items():
        each = {name: tensor}
        if hit := re.fullmatch(r"(.*\.)experts\.experts\.(linear_fc[12]\.weight)", name):
            each = {f"{hit[1]}experts.{hit[2]}{number}": expert for number, expert in enumerate(tensor)}
        for key, value in each.items():
            halves = value.chunk(2) if "linear_fc1.weight" in key else (value,)
            suffixes = ("_w", "_v") if len(halves) == 2 else ("",)
            made |= {f"model.module.{key}{s}": half for s, half in zip(suffixes, halves, strict=True)}
    return made


LEGACY_RANKS = {
    "mixtral": (Ranks(deal=[[[0]], [[1]]], tp=2, ep=2, etp=2), "te"),
    "llama": (Ranks(deal=[[[0, 1]]]), "oldest"),
    "llama with an optimizer": (Ranks(deal=[[[0, 1]]], tp=2), "te"),
}
"""How the legacy sources of the fuzzer are dealt, and the names of their modules."""


def _legacy_difference(folder: Path, family: str, found: Tensors, config: Mapping[str, Any]) -> str:
    with_optimizer = " with an optimizer" if (folder / "mp_rank_01").exists() else ""
    ranks, names = LEGACY_RANKS[family + with_optimizer]
    vocab_size, lost, seen = config["vocab_size"], set[str](), set[str]()
    for name, models in rank_models(found, config, ranks, names).items():
        file = folder / name / "model_optim_rng.pt"
        if not file.exists():
            continue  # a pair of ranks that no walk meets
        expected = dict(_flat(models["model"]))
        held = dict(_flat(loaded(file.read_bytes())["model"]))
        # What one rank has lost and another has is still there, whole.
        lost |= {_slice_name(name, key) for key in expected.keys() - held.keys()}
        seen |= {_slice_name(name, key) for key in held}
        expected = {key: tensor for key, tensor in expected.items() if key in held}
        rows = vocab_size if name.startswith("mp_rank_00") else 0  # it fits into the first rank's
        if told := difference(_without_padding(expected, rows), _without_padding(held, rows)):
            return f"{name}: {told}"
    return f"no rank has {sorted(lost - seen)[:5]}" if lost - seen else ""


def _slice_name(rank: str, key: str) -> str:
    """What ranks with copies of one slice have in common: norms and routers are whole on every TP rank."""
    return f"{rank[10:14]} {key}" if "norm" in key or "router" in key else f"{rank[8:14]} {key}"


def _without_padding(tensors: Tensors, rows: int) -> dict[str, Tensor]:
    """Only so many rows of the vocabulary: those beyond it tell nothing."""
    is_vocab = ("word_embeddings.weight", "output_layer.weight")
    return {name: tensor[:rows] if name.endswith(is_vocab) else tensor for name, tensor in tensors.items()}


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [] if prefix.endswith("_extra_state") else [(prefix, value)]
    items = value.items() if isinstance(value, dict) else ()
    return [pair for key, inner in items for pair in _flat(inner, f"{prefix}.{key}" if prefix else key)]
