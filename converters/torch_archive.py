"""The zip archive that torch.save writes: laid out before its data is known, and read without torch.load.

A `.distcp` file of a distributed checkpoint is a row of such archives. Entries are stored, never compressed;
tensor bytes begin at a multiple of 64, so that they can be mapped. Layout as of torch 2.x
(caffe2/serialize/inline_container.cc) and PKWARE's APPNOTE 6.3.
"""

from __future__ import annotations

import io
import os
import pickle
import stat
import struct
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, cast
from zlib import crc32

import torch

from ckptbridge.converters.errors import BadInputError, NotSupportedError, StorageError, told
from ckptbridge.converters.output import Patch
from ckptbridge.converters.pickles import StorageRef, TensorRef, read_pickle
from ckptbridge.converters.reading import read_exactly
from ckptbridge.converters.tensors import Stored

_LOCAL, _CENTRAL, _END, _END64, _LOCATOR64 = 0x04034B50, 0x02014B50, 0x06054B50, 0x06064B50, 0x07064B50
_ALIGNMENT = 64
_LIMIT = 0xFFFFFFFF
_UTF8 = 0x0800
_BEFORE_ZIP = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")
"""How torch.save's files began before they were zip archives: a pickled magic number."""

STORAGE_CLASSES = {
    torch.float32: torch.FloatStorage,
    torch.float64: torch.DoubleStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}
"""What a pickle calls the storage of a dtype."""

SAVED_DTYPES = frozenset(STORAGE_CLASSES)
"""Dtypes that archives are laid out for."""

_MOST_PICKLE_NBYTES = 1 << 28
"""A rank of a run with 10,000 tensors pickles their places in 2 MB; what is far larger is no checkpoint's."""


@dataclass(frozen=True, slots=True)
class TensorArchive:
    """Where everything of one saved tensor will stand, relative to the archive's first byte."""

    pickle: bytes
    data_nbytes: int
    data_offset: int
    size: int

    def frame(self, at: int, crc: int) -> Sequence[Patch]:
        """The bytes before and behind the data of an archive at `at`, for data with this CRC-32."""
        before, after = _frame(self.pickle, self.data_nbytes, crc)
        return [(at, before), (at + self.data_offset + self.data_nbytes, after)]


@lru_cache(maxsize=1024)
def tensor_archive(shape: tuple[int, ...], dtype: torch.dtype) -> TensorArchive:
    """The archive of a contiguous tensor of this shape; `size` bytes in all."""
    body = _tensor_pickle(shape, dtype)
    nbytes = prod(shape) * dtype.itemsize
    before, after = _frame(body, nbytes, 0)
    return TensorArchive(body, nbytes, len(before), len(before) + nbytes + len(after))


@dataclass(frozen=True)
class _SavedTensor:
    storage: Any
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __reduce__(self) -> Any:
        no_hooks = cast(Any, OrderedDict())
        arguments = (self.storage, 0, self.shape, self.stride, False, no_hooks)
        return torch._utils._rebuild_tensor_v2, arguments  # pyright: ignore


@dataclass(frozen=True)
class _SavedStorage:
    dtype: torch.dtype
    numel: int


class _TensorPickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _SavedStorage):
            return ("storage", STORAGE_CLASSES[obj.dtype], "0", "cpu", obj.numel)
        return None


@lru_cache(maxsize=1024)
def _tensor_pickle(shape: tuple[int, ...], dtype: torch.dtype) -> bytes:
    stride = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    out = io.BytesIO()
    _TensorPickler(out, protocol=2).dump(_SavedTensor(_SavedStorage(dtype, prod(shape)), shape, stride))
    return out.getvalue()


def _frame(body: bytes, nbytes: int, crc: int) -> tuple[bytes, bytes]:
    before, central = bytearray(), bytearray()
    for name, data in (("archive/data.pkl", body), ("archive/byteorder", b"little")):
        central += directory_entry(name, len(before), len(data), crc32(data))
        before += local_header(name, len(data), crc32(data)) + data
    name = "archive/data/0"
    central += directory_entry(name, len(before), nbytes, crc)
    before += local_header(name, nbytes, crc, at=len(before))
    after = bytearray()
    end = len(before) + nbytes
    for name, data in (("archive/version", b"3\n"),):
        central += directory_entry(name, end + len(after), len(data), crc32(data))
        after += local_header(name, len(data), crc32(data)) + data
    return bytes(before), bytes(after + central + directory_end(end + len(after), len(central), count=4))


def local_header(name: str, nbytes: int, crc: int, at: int | None = None) -> bytes:
    """A local file header; with `at`, padded so that the data behind it begins at a multiple of 64."""
    extra = struct.pack("<HHQQ", 1, 16, nbytes, nbytes) if nbytes >= _LIMIT else b""
    if at is not None:
        fill = -(at + 30 + len(name) + len(extra) + 4) % _ALIGNMENT
        extra += struct.pack("<HH", 0x4246, fill) + b"Z" * fill
    size = min(nbytes, _LIMIT)
    version = 45 if nbytes >= _LIMIT else 0
    head = struct.pack("<IHHHHHIIIHH", _LOCAL, version, _UTF8, 0, 0, 0, crc, size, size, len(name), len(extra))
    return head + name.encode() + extra


def directory_entry(name: str, at: int, nbytes: int, crc: int) -> bytes:
    """A file's entry in the directory at the archive's end; its local header stands at `at`."""
    wide = ([nbytes, nbytes] if nbytes >= _LIMIT else []) + ([at] if at >= _LIMIT else [])
    extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    size, version = min(nbytes, _LIMIT), 45 if wide else 0
    head = struct.pack(
        "<IHHHHHHIIIHHHHHII",
        _CENTRAL,
        version,
        version,
        _UTF8,
        0,
        0,
        0,
        crc,
        size,
        size,
        len(name),
        len(extra),
        0,
        0,
        0,
        0,
        min(at, _LIMIT),
    )
    return head + name.encode() + extra


def directory_end(at: int, nbytes: int, count: int) -> bytes:
    """What follows a directory of `count` entries that takes `nbytes` from byte `at` of the archive."""
    wide = b""
    if at >= _LIMIT or count >= 0xFFFF:
        wide = struct.pack("<IQHHIIQQQQ", _END64, 44, 45, 45, 0, 0, count, count, nbytes, at)
        wide += struct.pack("<IIQI", _LOCATOR64, 0, at + nbytes, 1)
    short = min(count, 0xFFFF)
    return wide + struct.pack("<IHHHHIIH", _END, 0, 0, short, short, min(nbytes, _LIMIT), min(at, _LIMIT), 0)


def read_archive(path: Path, offset: int = 0, length: int | None = None) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The object of a torch.save archive, its tensors as TensorRef, and {storage key: (offset, nbytes) in the file}.

    Raises BadInputError naming the file for a truncated or compressed archive.
    """
    where = f"{path} at byte {offset}" if offset else str(path)
    size = _file_size(path)
    length = size - offset if length is None else length
    if offset < 0 or length < 22 or offset + length > size:
        raise BadInputError(
            f"{where}: an archive of {length} bytes is expected, the file ends at {size}: it is truncated"
        )
    entries = _directory(path, offset, length, where)
    body = next((e for n, e in entries.items() if n.endswith("/data.pkl")), None)
    if body is None:
        raise BadInputError(f"{where}: no torch.save archive: data.pkl is missing")
    if body[1] > _MOST_PICKLE_NBYTES:
        raise BadInputError(f"{where}: its data.pkl takes {body[1]} bytes, which no checkpoint's does")
    order = next((e for n, e in entries.items() if n.endswith("/byteorder")), None)
    if order is not None and _read(path, order[0], min(order[1], 8)) != b"little":
        raise NotSupportedError(f"{where}: its numbers are not little-endian; load and save it on this machine")
    storages = {n.split("/data/", 1)[1]: e for n, e in entries.items() if "/data/" in n}
    return read_pickle(_read(path, *body), where), storages


def stored_tensor(ref: TensorRef, path: Path, storages: dict[str, tuple[int, int]], where: str) -> Stored:
    """A TensorRef as a tensor of the file. Raises BadInputError if it is no contiguous part of its storage."""
    storage: StorageRef = ref.storage
    numbers = (ref.storage_offset, *ref.shape, *ref.stride)
    if any(type(n) is not int or n < 0 for n in numbers) or len(ref.shape) != len(ref.stride):
        raise BadInputError(
            f"{where}: a tensor of shape {ref.shape} and strides {ref.stride} at {ref.storage_offset!r}"
        )
    if storage.key not in storages:
        raise BadInputError(f"{where}: storage {told(storage.key)} is missing from the archive")
    begin, nbytes = storages[storage.key]
    if nbytes != storage.numel * storage.dtype.itemsize:
        raise BadInputError(
            f"{where}: its storage is said to hold {told(storage.numel)} elements of {storage.dtype}, but has {nbytes} "
            "bytes in the archive"
        )
    start = ref.storage_offset * storage.dtype.itemsize
    need = prod(ref.shape) * storage.dtype.itemsize
    stride = tuple(prod(ref.shape[i + 1 :]) for i in range(len(ref.shape)))
    if need and any(a != b for a, b, n in zip(ref.stride, stride, ref.shape, strict=True) if n != 1):
        raise BadInputError(f"{where}: shape {list(ref.shape)} with strides {list(ref.stride)} is not contiguous")
    if start < 0 or start + need > nbytes:
        raise BadInputError(f"{where}: shape {list(ref.shape)} takes {need} bytes, its storage holds {nbytes - start}")
    return Stored(path, begin + start, ref.shape, storage.dtype)


_MOST_READ_NBYTES, _MOST_READ_IN_ALL_NBYTES = 1 << 20, 1 << 26
"""A step or a loss scale is one number; a tensor that is larger than this is no such value."""


def read_small_tensors(value: Any, path: Path, storages: dict[str, tuple[int, int]]) -> None:
    """Put tensors in the place of the small TensorRefs in a tree of dicts, lists and namespaces, wherever they stand.

    Raises BadInputError naming the file for one that is no contiguous part of its storage.
    """
    waiting: list[Any] = [value]
    seen: set[int] = set()
    left = _MOST_READ_IN_ALL_NBYTES
    while waiting:
        holder = waiting.pop()
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        held: Any = vars(holder) if isinstance(holder, Namespace) else holder
        if not isinstance(held, dict | list):
            continue
        entries: list[tuple[Any, Any]] = list(held.items() if isinstance(held, dict) else enumerate(held))  # pyright: ignore
        for place, found in entries:
            if not isinstance(found, TensorRef):
                waiting.append(found)
            elif (nbytes := prod(found.shape) * found.storage.dtype.itemsize) <= min(_MOST_READ_NBYTES, left):
                left -= nbytes
                held[place] = stored_tensor(found, path, storages, str(path)).read()


def _directory(path: Path, offset: int, length: int, where: str) -> dict[str, tuple[int, int]]:
    tail_at = max(0, length - 4096)
    tail = _read(path, offset + tail_at, length - tail_at)
    end = tail.rfind(struct.pack("<I", _END))
    if end < 0 and _read(path, offset, min(length, len(_BEFORE_ZIP))) == _BEFORE_ZIP:
        raise NotSupportedError(
            f"{where}: was written by torch.save before torch 1.6, or with _use_new_zipfile_serialization=False; "
            "load it with torch.load and save it again"
        )
    if end < 0 or len(tail) - end < 22:
        raise BadInputError(f"{where}: no zip archive ends here: it is truncated or overwritten")
    count, nbytes, at = struct.unpack_from("<HII", tail, end + 10)
    if at == _LIMIT or count == 0xFFFF:
        locator = tail.rfind(struct.pack("<I", _LOCATOR64), 0, end)
        if locator < 0:
            raise BadInputError(f"{where}: the archive's 64-bit directory is missing")
        end64 = _read(path, offset + _within(struct.unpack_from("<Q", tail, locator + 8)[0], 56, length, where), 56)
        count, nbytes, at = struct.unpack_from("<QQQ", end64, 32)
    if nbytes > _MOST_PICKLE_NBYTES:
        raise BadInputError(f"{where}: the archive's directory takes {nbytes} bytes, which no checkpoint's does")
    central = _read(path, offset + _within(at, nbytes, length, where), nbytes)
    entries: dict[str, tuple[int, int]] = {}
    cursor = 0
    for _ in range(count):
        if len(central) - cursor < 46 or struct.unpack_from("<I", central, cursor)[0] != _CENTRAL:
            raise BadInputError(f"{where}: the archive's directory is broken at its entry {len(entries)}")
        method, packed, size, name_len, extra_len, note_len, start = struct.unpack_from(
            "<10xH8xIIHHH8xI", central, cursor
        )
        raw_name = central[cursor + 46 : cursor + 46 + name_len]
        name = raw_name.decode(errors="replace")
        extra = central[cursor + 46 + name_len : cursor + 46 + name_len + extra_len]
        packed, size, start = _widen(extra, packed, size, start)
        if method or packed != size:
            raise BadInputError(f"{where}: entry {name} is compressed, which torch never does")
        head = _read(path, offset + _within(start, 30 + name_len, length, where), 30 + name_len)
        signature, local_name, local_extra = struct.unpack_from("<I22xHH", head)
        if signature != _LOCAL or local_name != name_len or head[30:] != raw_name:
            raise BadInputError(f"{where}: entry {name} does not begin where the directory says")
        entries[name] = (offset + _within(start + 30 + local_name + local_extra, size, length, where), size)
        cursor += 46 + name_len + extra_len + note_len
    return entries


def _widen(extra: bytes, packed: int, size: int, start: int) -> tuple[int, int, int]:
    cursor = 0
    while cursor + 4 <= len(extra):
        kind, nbytes = struct.unpack_from("<HH", extra, cursor)
        if kind == 1:
            values = [v for (v,) in struct.iter_unpack("<Q", extra[cursor + 4 : cursor + 4 + nbytes // 8 * 8])]
            size = values.pop(0) if size == _LIMIT and values else size
            packed = values.pop(0) if packed == _LIMIT and values else packed
            start = values.pop(0) if start == _LIMIT and values else start
        cursor += 4 + nbytes
    return packed, size, start


def _within(start: int, nbytes: int, length: int, where: str) -> int:
    if start < 0 or nbytes < 0 or start + nbytes > length:
        raise BadInputError(f"{where}: the archive points to byte {start + nbytes}, beyond its end at {length}")
    return start


def _read(path: Path, offset: int, nbytes: int) -> bytes:
    buffer = bytearray(nbytes)
    read_exactly(path, offset, memoryview(buffer))
    return bytes(buffer)


def _file_size(path: Path) -> int:
    try:
        found = os.stat(path)  # noqa: PTH116 - called once a chunk, 45,000 times for a 671B model
        if not stat.S_ISREG(found.st_mode):
            raise BadInputError(f"{path}: is no plain file")
        return found.st_size
    except FileNotFoundError as error:
        raise BadInputError(f"{path}: the file is missing") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from error
