"""Makers of bad checkpoints of every format, by rule: a cut at every boundary, a bad pickle wherever there is one."""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.converters.fuzz_archives import archive_boundaries, entries, records, saved_with_pickle, zipped
from tests.converters.fuzz_bytes import safetensors_boundaries
from tests.converters.fuzz_metadata import metadata_of
from tests.converters.fuzz_sources import Source

CARRIED = ("tokenizer.json", "ckptbridge_receipt.json")
"""Files that are copied byte for byte, or are not read."""


@dataclass(frozen=True)
class Spoiled:
    """A folder with some files replaced; the refusal must name `file`, and `words` where there are some."""

    told: str
    file: str
    changes: dict[str, bytes]
    words: tuple[str, ...] = ()


def read_files(source: Source) -> list[str]:
    """The files of a source that decide what is read."""
    return [name for name in source.files if not name.endswith(CARRIED)]


def cuts(source: Source) -> Iterator[Spoiled]:
    """Every file that is read, cut at every boundary of its structure."""
    for name in read_files(source):
        data = source.files[name]
        for told, at in boundaries(source, name).items():
            words = ("truncated",) if name.endswith((".safetensors", ".distcp")) else ()
            yield Spoiled(f"{name} cut {told}", name, {name: data[:at]}, words)


def boundaries(source: Source, name: str) -> dict[str, int]:
    """Where the parts of a file end."""
    data = source.files[name]
    if name.endswith(".safetensors"):
        return safetensors_boundaries(data)
    if name.endswith((".bin", ".pt")):
        return archive_boundaries(data)
    if name.endswith(".distcp"):
        return _archives_of(source, name)
    if name.endswith(".metadata"):
        starts = [place for _, _, place in pickletools.genops(data) if place is not None]
        return {f"before opcode {number}": at for number, at in enumerate(starts) if number % 9 == 0}
    return {"before everything": 0, "after the first byte": min(1, len(data) - 1), "in the middle": len(data) // 2}


def _archives_of(source: Source, name: str) -> dict[str, int]:
    _, metadata = metadata_of(dict(source.files))
    places: list[Any] = [i for i in metadata.storage_data.values() if name.endswith(f"/{i.relative_path}")]
    found: dict[str, int] = {"before everything": 0}
    for place in places:
        found |= {
            f"before byte {place.offset}": place.offset,
            f"within {place.offset}": place.offset + place.length // 2,
        }
    end = max(place.offset + place.length for place in places)
    return {told: at for told, at in found.items() if at < end} | {"a byte before the end": end - 1}


def with_pickle(source: Source, body: bytes) -> Iterator[Spoiled]:
    """Every pickle that is read when a checkpoint is opened or its tensors are, replaced."""
    for name in read_files(source):
        if name.endswith(".metadata"):
            yield Spoiled(name, name, {name: body})
        elif name.endswith((".bin", ".pt")):
            yield Spoiled(name, name, {name: saved_with_pickle(source.files[name], body)})
    if any(name.endswith(".distcp") for name in source.files):
        yield _with_archive(source, lambda blob: saved_with_pickle(blob, body))


def _with_archive(source: Source, change: Any) -> Spoiled:
    """The first tensor's archive of a `.distcp` file changed, and moved behind the others."""
    where, metadata = metadata_of(dict(source.files))
    index, info = next((i, p) for i, p in metadata.storage_data.items() if "layernorm" in i.fqn or "norm" in i.fqn)
    name = where.removesuffix(".metadata") + info.relative_path
    data = source.files[name]
    made = change(data[info.offset : info.offset + info.length])
    info.offset, info.length = len(data), len(made)
    return Spoiled(f"an archive of {name}", name, {name: data + made, where: pickle.dumps(metadata)}, (index.fqn,))


def bombs(source: Source) -> Iterator[Spoiled]:
    """Archives whose entries are compressed, among them one of 64 MB in 64 kB."""
    for name in read_files(source):
        if not name.endswith((".bin", ".pt")):
            continue
        held = entries(source.files[name])
        at = next((i for i, (entry, _) in enumerate(held) if "/data/" in entry), 0)  # common.pt has no tensors
        huge = [*held[:at], (held[at][0], bytes(64 << 20)), *held[at + 1 :]]
        for told, made in (("compressed", held), ("a zip bomb", huge)):
            yield Spoiled(f"{name} {told}", name, {name: zipped(made, zipfile.ZIP_DEFLATED)}, ("compressed",))
        yield Spoiled(f"{name} without data.pkl", name, {name: zipped([e for e in held if "data.pkl" not in e[0]])})
        stored = [i for i, (entry, _) in enumerate(held) if "/data/" in entry]
        if stored:
            longer = [(entry, body + b"x" if i == stored[0] else body) for i, (entry, body) in enumerate(held)]
            yield Spoiled(f"{name} with a storage too long", name, {name: zipped(longer)}, ("elements",))
            one, other = (records(source.files[name])["central"][i] for i in stored[:2])
            swapped = bytearray(source.files[name])
            swapped[one + 42 : one + 46], swapped[other + 42 : other + 46] = (
                swapped[other + 42 : other + 46],
                swapped[one + 42 : one + 46],
            )
            words = ("does not begin where the directory says",)
            yield Spoiled(f"{name} whose entries change places", name, {name: bytes(swapped)}, words)
        big = [(entry, b"big" if entry.endswith("byteorder") else body) for entry, body in held]
        yield Spoiled(f"{name} of another byte order", name, {name: zipped(big)}, ("little-endian",))
    if any(name.endswith(".distcp") for name in source.files):
        yield _with_archive(source, lambda blob: zipped(entries(blob), zipfile.ZIP_DEFLATED))


def json_of(source: Source) -> list[str]:
    """The JSON files that are read."""
    return [name for name in read_files(source) if name.endswith(".json")]


def bad_json(source: Source) -> Iterator[Spoiled]:
    """Every JSON file that is read: empty, no object, deep, huge numbers, other encodings, a name twice."""
    for name in json_of(source):
        text = source.files[name].decode()
        for told, made in {
            "of nothing": b"",
            "of null": b"null",
            "of a list": b"[]",
            "of a number": b"7",
            "of a string": b'"config"',
            "with another value behind it": source.files[name] + b"{}",
            "nested too deep": b'{"a":' * 100_000,
            "with a number of 10,000 digits": f'{text[:-1]}, "more": {"9" * 10_000}}}'.encode(),
            "in UTF-16": text.encode("utf-16"),
            "with a byte order mark": b"\xef\xbb\xbf" + source.files[name],
            "with a NUL": source.files[name].replace(b":", b"\0:", 1),
            "with half a character": source.files[name].replace(b'"', b'"\xc3', 1),
        }.items():
            yield Spoiled(f"{name} {told}", name, {name: made})


def hostile_index(source: Source) -> Iterator[Spoiled]:
    """An index that names what is no file of the folder."""
    for name in json_of(source):
        if not name.endswith("index.json"):
            continue
        index = json.loads(source.files[name])
        tensor = next(iter(index["weight_map"]))
        for file in (
            *("../x", "..", ".", "", "/etc/passwd", "a/b", "./a", "a\\b", "a\0b", "x" * 5000, "nowhere.safetensors"),
            *(None, 7, True, ["a"], {"a": 1}, 1.5, "\ud800", "é" * 200, "CON", name),
        ):
            spoiled = index | {"weight_map": index["weight_map"] | {tensor: file}}
            yield Spoiled(f"{name} naming {str(file)[:40]!r}", name, {name: json.dumps(spoiled).encode()})


def as_file(held: Any) -> bytes:
    """The bytes of torch.save."""
    import torch

    out = io.BytesIO()
    torch.save(held, out)
    return out.getvalue()
