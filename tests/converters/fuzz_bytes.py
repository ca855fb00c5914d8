"""Mutations of bytes, of JSON, and of safetensors headers."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

INTEGERS = (
    *(0, 1, -1, 2, 3, 7, 8, 12, 127, 128, 255, 256, 65535, 65536, 99_999, 10**6, 2**31 - 1, 2**31, 2**32 - 1, 2**32),
    *(2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 10**400, -2, -(2**31), -(2**63), -(10**30)),
)
STRINGS = (
    "",
    ".",
    "..",
    "../canary",
    "/etc/passwd",
    "a\0b",
    "x" * 5000,
    "config.json",
    "\ud800",
    "{0}",
    "F32",
    "é" * 99,
)


def strange_value(rng: random.Random) -> Any:
    """A JSON value that no field asks for."""
    return rng.choice(
        (
            lambda: rng.choice(INTEGERS),
            lambda: rng.choice(INTEGERS),
            lambda: rng.choice((float("nan"), float("inf"), -float("inf"), 1e308, -0.0, 0.5, 1e-320)),
            lambda: rng.choice(STRINGS),
            lambda: rng.choice((None, True, False)),
            lambda: [],
            lambda: {},
            lambda: [rng.choice(INTEGERS)] * rng.choice((1, 2, 3, 70, 5000)),
            lambda: {"a": [None]},
        )
    )()


def truncated(data: bytes, at: int) -> bytes:
    return data[: max(0, at)]


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8, 64))):
        if made:
            made[rng.randrange(len(made))] ^= 1 << rng.randrange(8)
    return bytes(made)


def overwrite(data: bytes, rng: random.Random) -> bytes:
    """A few bytes replaced by zeros, ones, noise, or another part of the file."""
    if not data:
        return b"\0"
    at, length = rng.randrange(len(data)), rng.choice((1, 2, 4, 8, 30, 500))
    new = rng.choice(
        (
            bytes(length),
            b"\xff" * length,
            rng.randbytes(length),
            data[(other := rng.randrange(len(data))) : other + length],
        )
    )
    return data[:at] + new + data[at + len(new) :]


def put_integer(data: bytes, rng: random.Random) -> bytes:
    """A little-endian integer of four or eight bytes somewhere, with a size that hurts."""
    size = rng.choice((2, 4, 8))
    if len(data) < size:
        return data + b"\xff"
    at = rng.randrange(len(data) - size + 1)
    return data[:at] + (rng.choice(INTEGERS) % (1 << (8 * size))).to_bytes(size, "little") + data[at + size :]


def splice(data: bytes, rng: random.Random) -> bytes:
    """Bytes taken out, put in, doubled, or put at the end."""
    at = rng.randrange(len(data) + 1)
    stop = min(len(data), at + rng.choice((1, 2, 8, 64, 1000)))
    return rng.choice(
        (
            data[:at] + data[stop:],
            data[:at] + rng.randbytes(rng.choice((1, 4, 64))) + data[at:],
            data[:stop] + data[at:],
            data + rng.randbytes(rng.choice((1, 22, 70_000))),
            data + data,
        )
    )


def cut_anywhere(data: bytes, rng: random.Random) -> bytes:
    return truncated(data, rng.randrange(len(data) + 1))


BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bits flipped": flip_bits,
    "bytes overwritten": overwrite,
    "an integer overwritten": put_integer,
    "bytes spliced": splice,
    "cut anywhere": cut_anywhere,
    "emptied": lambda data, rng: b"",
    "noise": lambda data, rng: rng.randbytes(rng.choice((1, 7, 8, 100, 5000))),
}


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value below a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*at, key)
        yield from places(inner, (*at, key))


def mutate_json(text: bytes, rng: random.Random) -> bytes:
    """One value replaced, removed, renamed, doubled, wrapped or buried."""
    value = json.loads(text)
    path = rng.choice(list(places(value)) or [()])
    if not path:
        return json.dumps(strange_value(rng)).encode()
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    key = path[-1]
    how = rng.randrange(9)
    if how <= 3:
        holder[key] = strange_value(rng)
    elif how == 4:
        del holder[key]
    elif how == 5 and isinstance(holder, dict):
        holder[rng.choice((*STRINGS, *holder))] = holder.pop(key)
    elif how == 6 and isinstance(holder, dict):
        other = rng.choice(list(holder))
        holder[key], holder[other] = holder[other], holder[key]
    elif how == 7:
        holder[key] = [holder[key]]
    else:
        return _textual(json.dumps(value), json.dumps(holder[key]), rng)
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _textual(text: str, chosen: str, rng: random.Random) -> bytes:
    """What json.dumps does not write: a key twice, a hundred thousand brackets, numbers of a million digits."""
    bomb = rng.choice(("[" * 100_000, '{"a":' * 100_000, "9" * 10_000, "1e999", "-", "NaN", '"\\ud800"', "[[[[]]]]"))
    made = rng.choice(
        (
            lambda: text.replace(chosen, bomb, 1),
            lambda: text[:-1] + ", " + text[1:],
            lambda: text.replace("{", '{"__metadata__": {}, ', 1),
            lambda: "\ufeff" + text,
            lambda: text.replace(" ", "\n" * 50),
        )
    )()
    return made.encode("utf-8", "surrogatepass")


def safetensors_parts(data: bytes) -> tuple[int, dict[str, Any]]:
    """(header length, header) of a sound file."""
    (length,) = struct.unpack("<Q", data[:8])
    return length, json.loads(data[8 : 8 + length])


def safetensors_boundaries(data: bytes) -> dict[str, int]:
    """Where a safetensors file's parts end, by name."""
    length, header = safetensors_parts(data)
    found = {
        "in the length": 4,
        "behind the length": 8,
        "in the header": 8 + length // 2,
        "behind the header": 8 + length,
    }
    for name, entry in header.items():
        if name != "__metadata__":
            found[f"behind {name}"] = 8 + length + entry["data_offsets"][1]
    end = max(found.values())
    return {name: at for name, at in found.items() if at < end} | {"a byte before the end": end - 1}


def with_header(data: bytes, header: bytes, length: int | None = None) -> bytes:
    old, _ = safetensors_parts(data)
    told = len(header) if length is None else length
    return struct.pack("<Q", told % 2**64) + header + data[8 + old :]


def mutate_safetensors(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A structural change of a safetensors file, and its name."""
    length, header = safetensors_parts(data)
    names = [name for name in header if name != "__metadata__"]
    entry, other = header[rng.choice(names)], header[rng.choice(names)]
    how = rng.randrange(8)
    if how == 0:
        return "cut at a boundary", truncated(data, rng.choice(list(safetensors_boundaries(data).values())))
    if how == 1:
        return "header length", with_header(data, data[8 : 8 + length], rng.choice((*INTEGERS, length - 1, length + 1)))
    if how == 2:
        return "header fields", with_header(data, mutate_json(data[8 : 8 + length], rng))
    if how == 3:
        entry["shape"] = rng.choice(
            ([2**62, 4], [0, 2**70], [], [1], [2] * 64, [1] * 100_000, [2**64] * 20_000, entry["shape"][::-1], [-1, -1])
        )
    elif how == 4:
        begin, end = entry["data_offsets"]
        shift = rng.choice((*INTEGERS, 1, 4, -4))
        entry["data_offsets"] = rng.choice(([begin + shift, end + shift], [begin, end + shift], [end, begin]))
    elif how == 5:
        entry["data_offsets"] = other["data_offsets"]
    elif how == 6:
        entry["dtype"] = rng.choice(("F64", "F16", "BF16", "I8", "BOOL", "F8_E4M3", "U16", "F4", "", None, [], "f32"))
    else:
        entry["shape"], other["shape"] = other["shape"], entry["shape"]
    return "header fields", with_header(data, json.dumps(header).encode())
