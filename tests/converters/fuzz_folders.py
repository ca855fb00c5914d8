"""One mutation of one source: which file, which change. Everything follows from the random generator that is given."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save

from tests.converters.fuzz_archives import mutate_archive
from tests.converters.fuzz_bytes import mutate_json, mutate_safetensors
from tests.converters.fuzz_metadata import mutate_bytes, mutate_megatron
from tests.converters.fuzz_pickles import mutate_pickle
from tests.converters.fuzz_sources import Source


@dataclass(frozen=True)
class Special:
    """Something that is no plain file: "folder", "pipe", "link"."""

    kind: str
    target: str = ""


Change = bytes | Special | None
"""What stands under a name instead; None: nothing."""


@dataclass(frozen=True)
class Mutation:
    kind: str
    changes: Mapping[str, Change]


def mutate(source: Source, rng: random.Random) -> Mutation:
    """A random change of a sound checkpoint; now and then two."""
    first = _mutate(source, rng)
    if rng.random() < 0.1:
        files = {**source.files, **{n: c for n, c in first.changes.items() if isinstance(c, bytes)}}
        name = rng.choice(list(files))
        _, data = mutate_bytes(files[name], rng)
        if isinstance(first.changes.get(name, b""), bytes):
            return Mutation("two changes", {**first.changes, name: data})
    return first


def _mutate(source: Source, rng: random.Random) -> Mutation:
    files = dict(source.files)
    # Small files that say much are worth more tries than tokenizers.
    name = rng.choice([n for n in files for _ in range(1 if "tokenizer" in n else 8)])
    how = rng.random()
    if how < 0.06:
        return _about_the_folder(files, name, rng)
    if how < 0.10:
        return _sound(source, rng) or Mutation("nothing", {})
    if how < 0.40:
        kind, data = mutate_bytes(files[name], rng)
        return Mutation(kind, {name: data})
    if made := mutate_megatron(files, name, rng) if how < 0.80 else None:
        return Mutation(*made)
    return _by_kind(files, name, rng)


def _by_kind(files: dict[str, bytes], name: str, rng: random.Random) -> Mutation:
    data = files[name]
    if name.endswith(".json"):
        return Mutation("JSON", {name: mutate_json(data, rng)})
    if name.endswith(".safetensors"):
        kind, made = mutate_safetensors(data, rng)
    elif name.endswith((".bin", ".pt")):
        kind, made = mutate_archive(data, rng)
    elif name.endswith(".metadata"):
        kind, made = mutate_pickle(data, rng)
    else:
        kind, made = mutate_bytes(data, rng)
    return Mutation(kind, {name: made})


def _about_the_folder(files: dict[str, bytes], name: str, rng: random.Random) -> Mutation:
    other = rng.choice(list(files))
    depth = "../" * name.count("/")
    links = (
        depth + other,
        name.split("/")[-1],
        "nowhere",
        "/dev/zero",
        "/dev/stdin",
        "/",
        depth + "../canary/file",
        ".",
    )
    changes: dict[str, dict[str, Change]] = {
        "file missing": {name: None},
        "file that is a folder": {name: Special("folder")},
        "file that is a pipe": {name: Special("pipe")},
        "file that is a link": {name: Special("link", rng.choice(links))},
        "files exchanged": {name: files[other], other: files[name]},
        "file under another name": {name: None, name + rng.choice(("x", "~", ".bak")): files[name]},
        "file doubled": {name.replace("00001", "00009") + rng.choice(("", "x")): files[name]},
    }
    kind = rng.choice(list(changes))
    return Mutation(kind, changes[kind])


def _sound(source: Source, rng: random.Random) -> Mutation | None:
    """Changes that leave a checkpoint sound: odd values, other dtypes, tensors in another order."""
    names = [n for n in source.files if n.endswith(".safetensors")]
    if not names:
        return None
    name = rng.choice(names)
    tensors = load(source.files[name])
    how = rng.randrange(5)
    key = rng.choice(list(tensors))
    if how == 0:
        flat = tensors[key].view(-1)
        flat[rng.randrange(flat.numel())] = rng.choice((float("nan"), float("inf"), -0.0, 1e38))
        return Mutation("a value that is no number", {name: save(tensors)})
    if how == 1:
        wide = rng.choice((torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.uint8, torch.bool))
        changed: dict[str, Change] = {n: save({k: t.to(wide) for k, t in load(source.files[n]).items()}) for n in names}
        return Mutation("another dtype", changed)
    if how == 2:
        return Mutation("tensors in another order", {name: _reordered(source.files[name], rng)})
    if how == 3:
        router = next((k for k in tensors if k.endswith("mlp.gate.weight")), key)
        rows = rng.choice((1, 3, 5, 8))
        tensors[router] = torch.ones(rows, *tensors[router].shape[1:], dtype=tensors[router].dtype)
        return Mutation("a router of other experts", {name: save(tensors)})
    tensors[key] = tensors[key].to(rng.choice((torch.float64, torch.float16, torch.int64)))
    return Mutation("one tensor of another dtype", {name: save(tensors)})


def _reordered(data: bytes, rng: random.Random) -> bytes:
    """The same file with its header's entries shuffled, which changes nothing."""
    length = int.from_bytes(data[:8], "little")
    header: list[tuple[str, Any]] = list(json.loads(data[8 : 8 + length]).items())
    rng.shuffle(header)
    raw = json.dumps(dict(header)).encode()
    return len(raw).to_bytes(8, "little") + raw + data[8 + length :]
