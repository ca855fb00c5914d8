"""Makers of bad Hugging Face folders: each breaks one thing and says which words a refusal must hold."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Bad:
    """`spoil(folder)` breaks a copy of the model `source`; the refusal must name all `words`."""

    source: str
    spoil: Callable[[Path], None]
    words: tuple[str, ...]


def edit_json(path: Path, **changes: Any) -> None:
    """Set fields of a JSON object; a value of ... removes the field."""
    value = json.loads(path.read_text())
    for name, new in changes.items():
        if new is ...:
            del value[name]
        else:
            value[name] = new
    path.write_text(json.dumps(value))


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any], *, keep_data: bool = True) -> None:
    """Rewrite the JSON header of a safetensors file; `change` may edit it in place or return the text itself."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    text = change(header)
    raw = (text if isinstance(text, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + (data[8 + length :] if keep_data else b""))


def edit_tensors(folder: Path, change: Callable[[dict[str, Any]], None], file: str = "model.safetensors") -> None:
    """Load a file, let `change` edit the tensors, save it again, and keep the index (if there is one) in step."""
    before = load_file(folder / file)
    after = dict(before)
    change(after)
    save_file(after, folder / file, {"format": "pt"})
    if (folder / INDEX).exists():
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        kept = {name: place for name, place in weight_map.items() if place != file or name in after}
        edit_json(folder / INDEX, weight_map=kept | dict.fromkeys(after, file))


def file_of(folder: Path, tensor: str) -> str:
    """The shard that holds a tensor."""
    if not (folder / INDEX).exists():
        return "model.safetensors"
    return json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def _cut(file: str, keep: Callable[[int, int], int]) -> Callable[[Path], None]:
    """Truncate a safetensors file to `keep(header length, size)` bytes."""

    def spoil(folder: Path) -> None:
        data = (folder / file).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        (folder / file).write_bytes(data[: keep(length, len(data))])

    return spoil


def _entry(name: str, **changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        edit_header(folder / "model.safetensors", lambda header: header[name].update(changes))

    return spoil


def _append(file: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes() + data) and None


def _config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def _point(tensor: str, file: Any) -> Callable[[Path], None]:
    """Let the index say that a tensor is in another file."""

    def spoil(folder: Path) -> None:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        edit_json(folder / INDEX, weight_map=weight_map | {tensor: file})

    return spoil


def _lose(*tensors: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for name in tensors:
            edit_tensors(folder, lambda held, name=name: held.pop(name), file_of(folder, name))

    return spoil


def _two_claim(folder: Path) -> None:
    name = "model.norm.weight"
    owner = file_of(folder, name)
    other = next(path.name for path in sorted(folder.glob("*.safetensors")) if path.name != owner)
    held = load_file(folder / other)
    save_file(held | {name: torch.ones(64)}, folder / other, {"format": "pt"})


def _twice_in_the_header(folder: Path) -> None:
    def twice(header: dict[str, Any]) -> str:
        name = "model.norm.weight"
        return json.dumps(header)[:-1] + f', "{name}": {json.dumps(header[name])}}}'

    edit_header(folder / "model.safetensors", twice)


def _overlap(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        names = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
        first, second = header[names[3]]["data_offsets"], header[names[4]]["data_offsets"]
        header[names[4]]["data_offsets"] = [second[0] - 4, second[1] - 4]
        assert first[1] == second[0]

    edit_header(folder / "model.safetensors", change)


def _half_of_a_head(folder: Path) -> None:
    """lm_head beside a tied embedding that it does not equal."""
    edit_tensors(folder, lambda held: held.update({"lm_head.weight": torch.full((250, 64), 0.5)}))


def _mixed_dtypes(folder: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    edit_tensors(folder, lambda held: held.update({name: held[name].half()}))


def _fp8(folder: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    edit_tensors(folder, lambda held: held.update({name: held[name].to(torch.float8_e4m3fn)}))


def _renamed(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")


def _as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


_MODEL, _NORM = "model.safetensors", "model.norm.weight"
_EXPERT_7 = tuple(f"model.layers.{i}.mlp.experts.7.{m}_proj.weight" for i in range(4) for m in ("gate", "up", "down"))

HF: dict[str, Bad] = {
    "empty file": Bad("llama", _cut(_MODEL, lambda h, n: 0), (_MODEL, "is empty", "truncated")),
    "cut in the length": Bad("llama", _cut(_MODEL, lambda h, n: 5), (_MODEL, "truncated")),
    "cut behind the length": Bad("llama", _cut(_MODEL, lambda h, n: 8), (_MODEL, "truncated")),
    "cut in the header": Bad("llama", _cut(_MODEL, lambda h, n: 8 + h // 2), (_MODEL, "truncated")),
    "cut behind the header": Bad("llama", _cut(_MODEL, lambda h, n: 8 + h), (_MODEL, "tensor", "truncated")),
    "cut in the data": Bad("llama", _cut(_MODEL, lambda h, n: n // 2), (_MODEL, "tensor", "truncated")),
    "cut by one byte": Bad("llama", _cut(_MODEL, lambda h, n: n - 1), (_MODEL, "tensor", "truncated")),
    "a byte too many": Bad("llama", _append(_MODEL, b"x"), (_MODEL, "1 bytes")),
    "header longer than the file": Bad(
        "llama",
        lambda d: (d / _MODEL).write_bytes(struct.pack("<Q", 1 << 40) + (d / _MODEL).read_bytes()[8:]) and None,
        (_MODEL, str(1 << 40)),
    ),
    "header of garbage": Bad("llama", lambda d: edit_header(d / _MODEL, lambda h: "}{ no json"), (_MODEL, "header")),
    "header that is a list": Bad("llama", lambda d: edit_header(d / _MODEL, lambda h: "[1, 2]"), (_MODEL, "header")),
    "header nested too deep": Bad(
        "llama", lambda d: edit_header(d / _MODEL, lambda h: "[" * 100_000), (_MODEL, "header")
    ),
    "a name twice in the header": Bad("llama", _twice_in_the_header, (_MODEL, _NORM, "twice")),
    "an entry that is a list": Bad(
        "llama", lambda d: edit_header(d / _MODEL, lambda h: h.update({_NORM: [1]})), (_MODEL, _NORM)
    ),
    "a dtype that nobody knows": Bad("llama", _entry(_NORM, dtype="F33"), (_MODEL, _NORM, "F33")),
    "a dtype that is a list": Bad("llama", _entry(_NORM, dtype=["F32"]), (_MODEL, _NORM)),
    "a dtype of another size": Bad("llama", _entry(_NORM, dtype="F64"), (_MODEL, _NORM, "512", "256")),
    "a shape of words": Bad("llama", _entry(_NORM, shape=["64"]), (_MODEL, _NORM)),
    "a negative size": Bad("llama", _entry(_NORM, shape=[-64]), (_MODEL, _NORM, "-64")),
    "a fractional size": Bad("llama", _entry(_NORM, shape=[64.0]), (_MODEL, _NORM)),
    "a shape that is null": Bad("llama", _entry(_NORM, shape=None), (_MODEL, _NORM)),
    "offsets that are one number": Bad("llama", _entry(_NORM, data_offsets=[0]), (_MODEL, _NORM)),
    "offsets backwards": Bad("llama", _entry(_NORM, data_offsets=[256, 0]), (_MODEL, _NORM)),
    "offsets beyond the file": Bad(
        "llama", _entry(_NORM, data_offsets=[1 << 40, (1 << 40) + 256]), (_MODEL, _NORM, "truncated")
    ),
    "offsets that overlap": Bad("llama", _overlap, (_MODEL, "tensor", "overlap")),
    "index naming a missing file": Bad(
        "qwen2", _point(_NORM, "model-00009-of-00009.safetensors"), (INDEX, _NORM, "model-00009-of-00009.safetensors")
    ),
    "index naming the folder above": Bad("qwen2", _point(_NORM, "../model.safetensors"), (INDEX, _NORM, "../")),
    "index naming an absolute path": Bad("qwen2", _point(_NORM, "/etc/passwd"), (INDEX, _NORM, "/etc/passwd")),
    "index naming the parent": Bad("qwen2", _point(_NORM, ".."), (INDEX, _NORM)),
    "index naming a file that lacks it": Bad(
        "qwen2", _point("model.embed_tokens.weight", "model-00002-of-00004.safetensors"), ("model.embed_tokens.weight",)
    ),
    "index naming a number": Bad("qwen2", _point(_NORM, 3), (INDEX, _NORM)),
    "index with a NUL in a name": Bad("qwen2", _point(_NORM, "a\0b"), (INDEX, _NORM)),
    "index of garbage": Bad("qwen2", lambda d: (d / INDEX).write_text("{") and None, (INDEX,)),
    "index that is a list": Bad("qwen2", lambda d: (d / INDEX).write_text("[]") and None, (INDEX,)),
    "index without a map": Bad("qwen2", lambda d: edit_json(d / INDEX, weight_map=...), (INDEX, "weight_map")),
    "index with an empty map": Bad("qwen2", lambda d: edit_json(d / INDEX, weight_map={}), (INDEX, "weight_map")),
    "index that is missing": Bad("qwen2", lambda d: (d / INDEX).unlink(), (INDEX, "model-00001-of")),
    "a tensor that the index does not name": Bad(
        "qwen2",
        lambda d: edit_json(
            d / INDEX,
            weight_map={k: v for k, v in json.loads((d / INDEX).read_text())["weight_map"].items() if k != _NORM},
        ),
        (_NORM, INDEX),
    ),
    "two shards claiming one tensor": Bad("qwen2", _two_claim, (_NORM, "model-0000")),
    "a shard that is missing": Bad(
        "qwen2", lambda d: (d / "model-00002-of-00004.safetensors").unlink(), ("model-00002-of-00004.safetensors",)
    ),
    "a shard that is truncated": Bad(
        "qwen2",
        _cut("model-00002-of-00004.safetensors", lambda h, n: n - 10),
        ("model-00002-of-00004.safetensors", "tensor", "truncated"),
    ),
    "expert 7 missing": Bad("qwen3_moe", _lose(*_EXPERT_7), ("12 missing", "experts.7.", "{0...3}")),
    "one matrix of expert 7 missing": Bad("qwen3_moe", _lose(_EXPERT_7[4]), ("1 missing", _EXPERT_7[4])),
    "a layer too few in the config": Bad(
        "llama", _config(num_hidden_layers=3), ("9 unexpected", "model.layers.3.mlp.gate_proj.weight")
    ),
    "a layer too many in the config": Bad(
        "llama", _config(num_hidden_layers=5), ("9 missing", "model.layers.4.mlp.gate_proj.weight")
    ),
    "an unknown tensor": Bad(
        "llama",
        lambda d: edit_tensors(d, lambda h: h.update({"model.layers.0.self_attn.sinks": torch.ones(8)})),
        ("1 unexpected", "model.layers.0.self_attn.sinks"),
    ),
    "a tensor with braces in its name": Bad(
        "llama",
        lambda d: edit_tensors(d, lambda h: h.update({"model.{0}.{oops}": torch.ones(8)})),
        ("1 unexpected", "oops"),
    ),
    "heads that contradict the tensors": Bad(
        "llama", _config(num_attention_heads=4), ("q_proj", "[32, 64]", "[64, 64]")
    ),
    "key heads that contradict the tensors": Bad(
        "llama", _config(num_key_value_heads=2), ("k_proj", "[16, 64]", "[32, 64]")
    ),
    "a vocabulary that contradicts the tensors": Bad(
        "llama", _config(vocab_size=300), ("model.embed_tokens.weight", "[300, 64]", "[250, 64]")
    ),
    "a width that contradicts the tensors": Bad("llama", _config(intermediate_size=128), ("gate_proj", "128", "96")),
    "experts that contradict the tensors": Bad("qwen3_moe", _config(num_local_experts=9), ("missing", "experts.8.")),
    "tied by the config, with a head of its own": Bad(
        "llama_tied", _half_of_a_head, ("lm_head.weight", "model.embed_tokens.weight")
    ),
    "not tied by the config, without a head": Bad(
        "llama_tied", _config(tie_word_embeddings=False), ("1 missing", "lm_head.weight")
    ),
    "biases that the config does not know": Bad(
        "qwen2",
        _config(
            architectures=["LlamaForCausalLM"],
            model_type="llama",
            layer_types=...,
            max_window_layers=...,
            sliding_window=...,
            use_sliding_window=...,
        ),
        ("12 unexpected", "q_proj.bias"),
    ),
    "parts of two dtypes": Bad(
        "llama", _mixed_dtypes, (_MODEL, "model.layers.1.self_attn.k_proj.weight", "float16", "float32")
    ),
    "a dtype that Megatron does not hold": Bad(
        "llama", _fp8, (_MODEL, "model.layers.1.mlp.down_proj.weight", "float8")
    ),
    "no config.json": Bad("llama", lambda d: (d / "config.json").unlink(), ("config.json", "missing")),
    "config.json of garbage": Bad("llama", lambda d: (d / "config.json").write_text("{,}") and None, ("config.json",)),
    "config.json that is a list": Bad(
        "llama", lambda d: (d / "config.json").write_text("[]") and None, ("config.json",)
    ),
    "config.json in Latin-1": Bad(
        "llama", lambda d: (d / "config.json").write_bytes('{"a": "é"}'.encode("latin1")) and None, ("config.json",)
    ),
    "an unknown architecture": Bad(
        "llama", _config(architectures=["BloomForCausalLM"]), ("BloomForCausalLM", "LlamaForCausalLM")
    ),
    "a quantised model": Bad("llama", _config(quantization_config={"quant_method": "fp8"}), ("quantization_config",)),
    "weights under another name": Bad("llama", _renamed, ("weights.safetensors", INDEX)),
    "pickled weights that hold nothing": Bad("llama", _as_pickle, ("39 missing", "model.embed_tokens.weight")),
    "no weights at all": Bad("llama", lambda d: (d / _MODEL).unlink(), (_MODEL,)),
}
