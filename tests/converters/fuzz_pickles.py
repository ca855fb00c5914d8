"""Mutations of pickles, opcode by opcode, and pickles that are written to hurt whoever loads them."""

from __future__ import annotations

import pickletools
import random
import struct
from collections.abc import Callable

from tests.converters.fuzz_bytes import INTEGERS, flip_bits

_POP, _STOP, _MARK = b"0", b".", b"("


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def whole(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8b" + struct.pack("<I", len(raw)) + raw


def called(module: str, name: str, *arguments: bytes) -> bytes:
    """GLOBAL, its arguments, REDUCE."""
    return f"c{module}\n{name}\n".encode() + _MARK + b"".join(arguments) + b"tR"


def _range(stop: int) -> bytes:
    return called("builtins", "range", whole(stop))


_DEEP = b")" + b"\x85" * 300_000
_LAUGHS = b")" + b"2\x86" * 60
_DICT_KEY = (b"}", b"Ns")


def _as_key(value: bytes) -> bytes:
    return _DICT_KEY[0] + value + _DICT_KEY[1]


def _many_copies(one: bytes, how: tuple[bytes, bytes], count: int = 20_000) -> bytes:
    """`one` is built once, and copied again and again by a call of its own, the copies kept."""
    return one + b"q\xf0" + _MARK + (how[0] + b"h\xf0" + how[1]) * count + b"l"


RUNS_CODE: dict[str, bytes] = {
    f"asks for {module}.{name}": called(module, name, *arguments)
    for module, name, arguments in (
        ("os", "system", (text("touch ckptbridge-was-here"),)),
        ("posix", "system", (text("true"),)),
        ("builtins", "eval", (text("open('canary', 'w')"),)),
        ("builtins", "exec", (text("raise SystemExit(9)"),)),
        ("builtins", "getattr", (b"N", text("x"))),
        ("builtins", "__import__", (text("antigravity"),)),
        ("builtins", "open", (text("ckptbridge-was-here"), text("w"))),
        ("__builtin__", "print", (text("it ran"),)),
        ("subprocess", "Popen", (text("true"),)),
        ("pickle", "loads", (text("x"),)),
        ("torch", "load", (text("/etc/passwd"),)),
        ("torch.serialization", "load", (text("/etc/passwd"),)),
        ("torch.hub", "load", (text("a/b"),)),
        ("torch", "set_num_threads", (whole(1),)),
        ("torch.storage", "_load_from_bytes", (text("x"),)),
        ("pathlib", "Path.write_text", (text("ckptbridge-was-here"), text("x"))),
        ("argparse", "Namespace.__init__", (b"N",)),
        ("argparse", "FileType", (text("w"),)),
        ("functools", "partial", (b"N",)),
        ("operator", "attrgetter", (text("x"),)),
        ("megatron.core.os", "system", (text("true"),)),
        ("megatron.core", "x.__class__", ()),
        ("torch", "float32.__class__", ()),
        ("builtins", "SystemExit", (whole(9),)),
        ("builtins", "KeyboardInterrupt", ()),
        ("collections", "OrderedDict.fromkeys", (_range(10**9),)),
    )
}
GREEDY: dict[str, bytes] = {
    "a bytearray of 10 GB": called("builtins", "bytearray", whole(10**10)),
    "a bytearray of 600 MB": called("builtins", "bytearray", whole(6 * 10**8)),
    "a set of a range": called("builtins", "set", _range(10**9)),
    "a frozenset of a range": called("builtins", "frozenset", _range(10**9)),
    "a torch.Size of a range": called("torch", "Size", _range(10**9)),
    "a dict of a range": called("collections", "OrderedDict", _range(10**9)),
    "a path of a range": called("pathlib", "PosixPath", _range(10**9)),
    "a memo of 2**31": b"N" + b"r" + struct.pack("<I", 2**31 - 1),
    "a memo of 2**28": b"N" + b"r" + struct.pack("<I", 2**28),
    "a memo of 10**10": b"N" + b"p10000000000\n",
    "bytes of 2**40": b"\x8e" + struct.pack("<Q", 2**40) + b"x",
    "bytes of 2**63": b"\x8e" + struct.pack("<Q", 2**63) + b"x",
    "bytes of 2**31": b"B" + struct.pack("<I", 2**31 - 1) + b"x",
    "bytes of 3 GB": b"\x8e" + struct.pack("<Q", 3 * 2**30) + b"x",
    "a bytearray opcode of 3 GB": b"\x96" + struct.pack("<Q", 3 * 2**30) + b"x",
    "text of 2**40": b"\x8d" + struct.pack("<Q", 2**40) + b"x",
    "a frame of 2**62": b"\x95" + struct.pack("<Q", 2**62),
    "a long of 2**31 bytes": b"\x8b" + struct.pack("<i", 2**31 - 1),
    "a long of -1 bytes": b"\x8b" + struct.pack("<i", -1),
    "bytes encoded 20,000 times": _many_copies(text("x" * 200_000), (b"c_codecs\nencode\n", b"\x85R")),
    "a bytearray copied 20,000 times": _many_copies(
        b"B" + struct.pack("<I", 200_000) + bytes(200_000), (b"cbuiltins\nbytearray\n", b"\x85R")
    ),
    "a list copied 20,000 times": _many_copies(
        _MARK + b"K\x01" * 50_000 + b"l", (b"cbuiltins\nfrozenset\n", b"\x85R"), 20_000
    ),
    "a state copied 20,000 times": _many_copies(
        b"}" + _MARK + b"".join(text(f"k{i}") + b"N" for i in range(5000)) + b"u",
        (b"cargparse\nNamespace\n)\x81", b"b"),
    ),
    "a path of 20,000 long parts": text("x/" * 100_000)
    + b"q\xf0"
    + b"cpathlib\nPosixPath\n"
    + _MARK
    + b"h\xf0" * 20_000
    + b"tR",
}
SLOW: dict[str, bytes] = {
    "a key of deep tuples": _as_key(_DEEP),
    "a key of doubled tuples": _as_key(_LAUGHS),
    "a set of doubled tuples": b"\x8f" + _MARK + _LAUGHS + b"\x90",
    "a frozenset of doubled tuples": _MARK + _LAUGHS + b"\x91",
    "a key that is an index of doubled tuples": _as_key(
        b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n" + text("a") + _LAUGHS + b"\x86R"
    ),
    "a key that is an inert value of doubled tuples": _as_key(b"cmegatron.core\nx\n" + _LAUGHS + b"\x85R"),
    "a persistent id of doubled tuples": _LAUGHS + b"Q",
    "a persistent id of deep tuples": _DEEP + b"Q",
    "a persistent id of doubled lists": b"]" + b"q\xf0" + b"(h\xf0h\xf0lq\xf0" * 60 + b"Q",
    "a long of a megabyte": b"\x8b" + struct.pack("<I", 10**6) + b"\x7f" * 10**6,
    "a key that is a long of a megabyte": _as_key(b"\x8b" + struct.pack("<I", 10**6) + b"\x7f" * 10**6),
    "a text of a long": b"L" + b"9" * 5000 + b"L\n",
    "lists within lists": _MARK * 200_000 + b"l" * 200_000,
    "a list within itself": b"]q\xf0h\xf0a",
    "a dictionary within itself": b"}q\xf0" + text("a") + b"h\xf0s",
    "states within states": b"cargparse\nNamespace\n)\x81}" + text("a") + b"cargparse\nNamespace\n)\x81sb",
}
ODD: dict[str, bytes] = {
    "a class given a method": b"cargparse\nNamespace\n}" + text("__eq__") + b"Nsb",
    "an object of another class": b"cargparse\nNamespace\n)\x81N}" + text("__class__") + b"Ns\x86b",
    "a dictionary that is a tuple": b"cargparse\nNamespace\n)\x81N}" + text("__dict__") + b")s\x86b",
    "metadata built empty": b"ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81",
    "an extension": b"\x82\x01",
    "a persistent id of text": b"Pstorage\n",
    "an old instance": b"(iargparse\nNamespace\n",
    "an instance by keywords": b"cargparse\nNamespace\n)}" + text("a") + b"Ns\x92",
    "a buffer": b"\x97",
    "a storage of nothing": _MARK + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"NtQ",
    "a storage of text": _MARK
    + text("storage")
    + b"ctorch\nFloatStorage\n"
    + text("0")
    + text("cpu")
    + text("x")
    + b"tQ",
    "a storage of a long": _MARK
    + text("storage")
    + b"ctorch\nFloatStorage\n"
    + text("0")
    + text("cpu")
    + whole(10**400)
    + b"tQ",
    "a tensor of nothing": called("torch._utils", "_rebuild_tensor_v2", b"N", b"N", b"N", b"N"),
    "a dtype of nothing": b"ctorch\nfloat33\n",
    "an enum of megatron": called("megatron.core.enums", "ModelType", whole(1)),
    "bytes of an encoding": called("_codecs", "encode", text("x"), text("rot13")),
    "an encoding that is nothing": called("_codecs", "encode", text("x"), text("no-such")),
    "a slice": called("builtins", "slice", b"N", b"N", b"N"),
    "a complex of text": called("builtins", "complex", text("9" * 100_000)),
}
HOSTILE: dict[str, bytes] = RUNS_CODE | GREEDY | SLOW | ODD
"""Opcodes that leave one value on the stack, or never get so far."""


def alone(snippet: bytes) -> bytes:
    """A pickle of this value."""
    return b"\x80\x04" + snippet + _STOP


def within(data: bytes, snippet: bytes, rng: random.Random) -> bytes:
    """The value made and thrown away somewhere in a sound pickle."""
    at = rng.choice([place for _, _, place in pickletools.genops(data) if place is not None][1:] or [0])
    return data[:at] + snippet + _POP + data[at:]


def opcode_starts(data: bytes) -> list[int]:
    return [place for _, _, place in pickletools.genops(data) if place is not None]


def mutate_pickle(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A change of a sound pickle, and its name."""
    how = rng.randrange(8)
    starts = [*opcode_starts(data), len(data)]
    at = rng.randrange(len(starts) - 1)
    begin, stop = starts[at], starts[at + 1]
    if how == 0:
        return "pickle cut at an opcode", data[:begin] + rng.choice((b"", _STOP))
    if how == 1:
        return "an opcode removed", data[:begin] + data[stop:]
    if how == 2:
        return "an opcode doubled", data[:stop] + data[begin:]
    if how == 3:
        other = rng.randrange(len(starts) - 1)
        return "an opcode replaced", data[:begin] + data[starts[other] : starts[other + 1]] + data[stop:]
    if how == 4:
        made = rng.choice(
            (whole(rng.choice(INTEGERS)), b"N", b")", b"]", b"}", text("x"), b"\x88", b"G" + b"\x7f\xf8" + bytes(6))
        )
        return "a value replaced", data[:begin] + made + data[stop:]
    if how == 5:
        return "opcode bits flipped", data[:begin] + flip_bits(data[begin:stop], rng) + data[stop:]
    name = rng.choice(list(HOSTILE))
    if how == 6:
        return f"pickle that {_verb(name)}", alone(HOSTILE[name])
    return f"pickle with {_verb(name)}", within(data, HOSTILE[name], rng)


def _verb(name: str) -> str:
    group = next(
        told for told, held in (("asks", RUNS_CODE), ("greedy", GREEDY), ("slow", SLOW), ("odd", ODD)) if name in held
    )
    return {"asks": "asks for code", "greedy": "asks for memory", "slow": "asks for time", "odd": "odd values"}[group]


Mutate = Callable[[bytes, random.Random], tuple[str, bytes]]
