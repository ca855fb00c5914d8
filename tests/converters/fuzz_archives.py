"""Mutations of torch.save archives: zip headers and directories, entries that overlap, lie or explode, pickles."""

from __future__ import annotations

import io
import random
import struct
import warnings
import zipfile
from collections.abc import Sequence

from tests.converters.fuzz_bytes import INTEGERS, truncated
from tests.converters.fuzz_pickles import mutate_pickle

Entries = list[tuple[str, bytes]]

_LOCAL_FIELDS = ((4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2))
_CENTRAL_FIELDS = ((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (34, 2), (42, 4))
_END_FIELDS = ((4, 2), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2))
"""(offset, size) of the numbers in PKWARE's three records."""


def entries(data: bytes) -> Entries:
    """The entries of a sound archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def zipped(held: Sequence[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names that appear twice are meant
        with zipfile.ZipFile(out, "w", method) as archive:
            for name, body in held:
                archive.writestr(zipfile.ZipInfo(name), body, method)
    return out.getvalue()


def records(data: bytes) -> dict[str, list[int]]:
    """Where the records of a sound archive begin: each entry's local header, each of the directory's, the end."""
    end = data.rfind(b"PK\x05\x06")
    count, at = struct.unpack_from("<H4xI", data, end + 10)
    central, local = [], []
    for _ in range(count):
        central.append(at)
        name, extra, note, start = struct.unpack_from("<HHH8xI", data, at + 28)
        local.append(start)
        at += 46 + name + extra + note
    return {"local": local, "central": central, "end": [end]}


def archive_boundaries(data: bytes) -> dict[str, int]:
    """Where an archive's parts end, by name."""
    found = {"behind four bytes": 4}
    places = records(data)
    for at, name in zip(places["local"], (name for name, _ in entries(data)), strict=True):
        names, extra = struct.unpack_from("<HH", data, at + 26)
        found |= {f"before {name}": at, f"in the header of {name}": at + 15, f"behind the header of {name}": at + 30}
        found[f"behind the name of {name}"] = at + 30 + names + extra
    for number, at in enumerate(places["central"]):
        found |= {f"before directory entry {number}": at, f"in directory entry {number}": at + 40}
    end = places["end"][0]
    return found | {"before the end record": end, "in the end record": end + 10, "a byte before the end": len(data) - 1}


def _field(data: bytes, rng: random.Random) -> bytes:
    kind = rng.choice(("local", "central", "central", "end"))
    at = rng.choice(records(data)[kind])
    offset, size = rng.choice({"local": _LOCAL_FIELDS, "central": _CENTRAL_FIELDS, "end": _END_FIELDS}[kind])
    old = int.from_bytes(data[at + offset : at + offset + size], "little")
    value = rng.choice((*INTEGERS, old + 1, old - 1, old * 2, 8, 0xFFFFFFFF)) % (1 << (8 * size))
    return data[: at + offset] + value.to_bytes(size, "little") + data[at + offset + size :]


def _lies(data: bytes, rng: random.Random) -> bytes:
    """One entry's size or place, in the directory, as another's: they overlap, or one is inside the other."""
    one, other = (rng.choice(records(data)["central"]) for _ in range(2))
    made = bytearray(data)
    for offset, size in rng.choice((((20, 4), (24, 4)), ((42, 4),), ((20, 4), (24, 4), (42, 4)))):
        made[one + offset : one + offset + size] = data[other + offset : other + offset + size]
    return bytes(made)


def _wide(data: bytes, rng: random.Random) -> bytes:
    """The directory said to be 64 bits wide, with a locator and a record that lie."""
    end = records(data)["end"][0]
    number = rng.choice(INTEGERS) % 2**64
    count, nbytes, at = rng.choice(((number, 46, 0), (4, number, 0), (4, 46, number), (2**63, 2**63, 2**63)))
    record = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count % 2**64, count % 2**64, nbytes, at)
    locator = struct.pack("<IIQI", 0x07064B50, 0, rng.choice((end, number, 2**64 - 1)), 1)
    return (
        data[:end]
        + record
        + locator
        + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    )


_NAMES = (
    "",
    "../canary",
    "/etc/passwd",
    "a\0b",
    "archive/data/0",
    "archive/data.pkl",
    "x" * 60_000,
    "archive/data/../../x",
    "data/",
)


def mutate_archive(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A change of a sound archive, and its name."""
    how = rng.randrange(12)
    if how == 0:
        return "zip cut at a boundary", truncated(data, rng.choice(list(archive_boundaries(data).values())))
    if how <= 2:
        return "zip field", _field(data, rng)
    if how == 3:
        return "zip entries that overlap", _lies(data, rng)
    if how == 4:
        return "zip of 64 bits", _wide(data, rng)
    held = entries(data)
    at = rng.randrange(len(held))
    name, body = held[at]
    if how == 5:
        if rng.random() < 0.5:
            held[at] = (name, bytes(rng.choice((10**5, 30 * 10**6))))
        return "zip that is compressed", zipped(held, rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)))
    if how == 6:
        held[at] = (rng.choice(_NAMES), body)
        return "zip entry renamed", zipped(held)
    if how == 7:
        made = rng.choice(
            (held[:at] + held[at + 1 :], [*held, held[at]], held[::-1], [], held * 3, [*held, (name, b"")])
        )
        return "zip entries dropped or doubled", zipped(made)
    if how == 8:
        held[at] = (name, rng.choice((b"", body[:-1], body + b"x", body * 2)))
        return "zip entry of another length", zipped(held)
    where = next(i for i, (name, _) in enumerate(held) if name.endswith("/data.pkl"))
    kind, changed = mutate_pickle(held[where][1], rng)
    held[where] = (held[where][0], changed)
    return kind, zipped(held)


def saved_with_pickle(data: bytes, body: bytes) -> bytes:
    """A sound archive whose data.pkl is replaced."""
    return zipped([(name, body if name.endswith("/data.pkl") else old) for name, old in entries(data)])
