"""Pickles of strangers: nothing runs, what is not admitted is refused by its name, what Megatron saves is read."""

from __future__ import annotations

import argparse
import builtins
import contextlib
import copyreg
import io
import os
import pickle
import signal
import struct
import subprocess
import sys
import types
from enum import Enum
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from ckptbridge.converters import pickles
from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.mcore import distributed_metadata
from ckptbridge.converters.pickles import Inert, read_pickle
from tests.converters.test_distributed_metadata import plain


class Call:
    """Pickles to a call of `function` with `arguments` when it is read."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def gadgets(witness: Path) -> dict[str, tuple[Any, str]]:
    """Objects whose unpickling would create the file `witness`, and the name that a refusal must tell."""
    touch = f"touch {witness}"
    code = f"open({str(witness)!r}, 'w').close()"
    inner = pickle.dumps(Call(os.system, touch))
    return {
        "os.system": (Call(os.system, touch), "system"),
        "eval": (Call(eval, f"__import__('os').system({touch!r})"), "eval"),
        "exec": (Call(exec, code), "exec"),
        "subprocess": (Call(subprocess.Popen, ["touch", str(witness)]), "Popen"),
        "check_output": (Call(subprocess.check_output, ["touch", str(witness)]), "check_output"),
        "open": (Call(open, str(witness), "w"), "open"),
        "import": (Call(builtins.__import__, "antigravity"), "__import__"),
        "getattr": (Call(getattr, os, "system"), ""),
        "pickle in pickle": (Call(pickle.loads, inner), "loads"),
        "torch.load": (Call(torch.load, io.BytesIO(inner)), ""),
        "torch.jit": (Call(torch.jit.load, str(witness)), "torch.jit"),
        "Path.touch": (Call(Path.touch, witness), ""),
        "PosixPath": (Call(PosixPath.write_text, witness, "x"), ""),
        "globals": (Call(globals), "globals"),
        "partial": (Call(__import__("functools").partial, os.system, touch), "partial"),
        "map": (Call(map, eval, [code]), ""),
        "compile": (Call(compile, "1", "x", "eval"), "compile"),
        "inside a list": ([1, {"a": (Call(os.system, touch),)}], "system"),
        "inside a namespace": (argparse.Namespace(a=Call(os.system, touch)), "system"),
        "as a set's member": ({Call(os.system, touch)}, "system"),
    }


NAMES = list(gadgets(Path("x")))


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("name", NAMES)
def test_a_gadget_is_refused_by_name_and_never_runs(name: str, protocol: int, tmp_path: Path) -> None:
    witness = tmp_path / "it_ran"
    value, told = gadgets(witness)[name]
    data = _dumped(value, protocol)
    with pytest.raises(NotSupportedError) as refused:
        read_pickle(data, "the/file.pt")
    assert told in str(refused.value)
    assert "the/file.pt" in str(refused.value)
    assert not witness.exists()


def _dumped(value: Any, protocol: int) -> bytes:
    copyreg.pickle(types.ModuleType, lambda module: (__import__, (module.__name__,)))
    try:
        return pickle.dumps(value, protocol)
    finally:
        copyreg.dispatch_table.pop(types.ModuleType)


def test_the_gadgets_do_run_under_plain_pickle(tmp_path: Path) -> None:
    """Otherwise the test above would prove nothing."""
    for name in ("os.system", "eval", "exec", "pickle in pickle", "inside a namespace"):
        witness = tmp_path / name.replace(" ", "_")
        pickle.loads(_dumped(gadgets(witness)[name][0], 2))
        assert witness.exists(), name


def call_by_hand(module: str, name: str, *, stack_global: bool = False) -> bytes:
    """A pickle that calls a global with no arguments, written opcode by opcode."""
    if stack_global:
        words = b"".join(b"\x8c" + bytes([len(w)]) + w.encode() for w in (module, name))
        return b"\x80\x04" + words + b"\x93)R."
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b")R."


@pytest.mark.parametrize("stack_global", [False, True])
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "getcwd"),
        ("argparse", "Namespace.__init__.__globals__"),
        ("argparse", "ArgumentParser"),
        ("collections", "OrderedDict.__class__"),
        ("torch", "load"),
        ("torch", "_C"),
        ("torch.serialization", "load"),
        ("torch.serialization", "os"),
        ("torch.distributed.checkpoint.metadata", "os"),
        ("torch.distributed.checkpoint.filesystem", "os"),
        ("torch.storage", "_load_from_bytes"),
        ("torch._utils", "_rebuild_wrapper_subclass"),
        ("builtins", "__import__"),
        ("builtins", "getattr"),
        ("numpy", "load"),
        ("megatronx.core", "run"),
        ("ckptbridge.converters.pickles", "io"),
        ("sys", "exit"),
    ],
)
def test_globals_that_are_not_admitted_are_refused(module: str, name: str, stack_global: bool) -> None:
    with pytest.raises(BadInputError) as refused:
        read_pickle(call_by_hand(module, name, stack_global=stack_global), "file")
    assert f"{module}.{name}" in str(refused.value)


class TransformerEnum(Enum):
    """Stands in for an enum of megatron: pickled under a name that no process here can import."""

    local = 1


def test_enums_and_recipes_of_megatron_become_inert_values() -> None:
    for module in ("megatron.core.transformer.enums", "megatron.training.config", "transformer_engine.common.recipe"):
        assert "megatron" not in sys.modules
        data = b"\x80\x02c" + f"{module}\nAttnBackend\nK\x05\x85R.".encode("latin1")
        value = read_pickle(data, "file")
        assert value == Inert(f"{module}.AttnBackend", (5,))
        assert "megatron" not in sys.modules
        assert "transformer_engine" not in sys.modules
    assert read_pickle(pickle.dumps(signal.SIGTERM, 2), "file") == Inert("signal.Signals", (15,))


def test_an_inert_value_does_nothing_with_what_it_is_given(tmp_path: Path) -> None:
    """Called, built upon, extended and keyed: none of it reaches code."""
    inert = b"cmegatron.core.x\nY\n"
    made = {
        "called with a dict": b"\x80\x02" + inert + b"}\x85R.",
        "called twice": b"\x80\x02" + inert + b")R)R.",
        "state": b"\x80\x02" + inert + b")R}U\x01aK\x01sb.",
        "state of slots": b"\x80\x02" + inert + b")RN}U\x08__call__K\x01s\x86b.",
        "appended to": b"\x80\x02" + inert + b")RK\x01a.",
        "items": b"\x80\x02" + inert + b")RK\x01K\x02s.",
        "new object": b"\x80\x02" + inert + b")\x81.",
        "new object with keywords": b"\x80\x04" + inert + b")}\x92.",
        "a key": b"\x80\x02}" + inert + b")RK\x01s.",
    }
    for name, data in made.items():
        try:
            value = read_pickle(data, "file")
        except BadInputError as refused:
            assert "file" in str(refused), name  # noqa: PT017
        else:
            assert isinstance(value, Inert | dict), name


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("argparse", "Namespace"),
        ("torch.distributed.checkpoint.metadata", "Metadata"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch.serialization", "_get_layout"),
        ("megatron.core.x", "Y"),
    ],
)
def test_a_pickle_cannot_change_the_classes_that_it_names(module: str, name: str) -> None:
    """BUILD with a slots state is setattr: on an admitted class it would change this very process."""
    data = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"N}U\x07plantedK\x01s\x86b."
    with contextlib.suppress(BadInputError):
        read_pickle(data, "file")
    shared = (
        argparse.Namespace,
        distributed_metadata.Metadata,
        Inert,
        pickles._rebuild_tensor,
        torch.serialization._get_layout,
    )
    changed = [value for value in shared if hasattr(value, "planted")]
    for value in changed:
        del value.planted
    assert not changed


def test_what_megatron_saves_is_read() -> None:
    value = {
        "args": argparse.Namespace(num_layers=2, params_dtype=torch.bfloat16, path=PosixPath("/a/b"), window=(3, 0)),
        "checkpoint_version": 3.0,
        "size": torch.Size((2, 3)),
        "nothing": None,
        "numbers": [1, 2**70, -1.5, True, 1j, range(3), slice(1, 2)],
        "names": {"a", "b"},
        "bytes": b"\x00\xff",
        "dtypes": [torch.float32, torch.float8_e4m3fn, torch.int64, torch.bool],
    }
    for protocol in (2, 4, 5):
        back = read_pickle(pickle.dumps(value, protocol), "file")
        assert str(back["args"].path) == "/a/b"
        back["args"].path = value["args"].path
        assert back == value


def test_dcp_metadata_is_read() -> None:
    index = MetadataIndex("a.weight", torch.Size((0, 0)))
    metadata = Metadata(
        state_dict_metadata={
            "a.weight": TensorStorageMetadata(
                TensorProperties(dtype=torch.bfloat16),
                torch.Size((4, 2)),
                [ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((4, 2)))],
            ),
            "b": BytesStorageMetadata(),
        },
        planner_data=None,
        storage_data={index: _StorageInfo("__0_0.distcp", 0, 100)},
        storage_meta=StorageMeta(checkpoint_id="/somewhere", save_id="x"),
    )
    for protocol in (2, 4, 5):
        back = read_pickle(pickle.dumps(metadata, protocol), "file")
        assert isinstance(back, distributed_metadata.Metadata)
        assert plain(back) == plain(metadata)
        assert back.storage_data[next(iter(back.storage_data))].relative_path == "__0_0.distcp"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80",
        b"\x80\x02",
        b".",
        b"N",
        b"garbage that is no pickle",
        b"\x80\xff.",
        b"\x80\x02]q\x00",
        b"\x80\x02K\x01K\x02s.",
        b"\x80\x02X" + struct.pack("<I", 1 << 31) + b"short",
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"short",
        b"\x80\x02\x82\x01.",  # an extension code that nobody registered
        b"\x80\x02(U\x07storageK\x01tQ.",  # a persistent id that is too short
        b"\x80\x02U\x03abcQ.",
        b"\x80\x02ctorch\nFloatStorage\n)R.",  # calling a dtype
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00))tR.",  # a tensor of no storage
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02ctorch\nSize\nK\x01\x85R.",
        b"\x80\x02cbuiltins\nbytearray\n\x8a\x08" + struct.pack("<q", 1 << 60) + b"\x85R.",
        b"\x80\x02c_codecs\nencode\nK\x01\x85R.",
        b"\x80\x02}]K\x01s.",  # a list as a key
    ],
    ids=range(21),
)
def test_a_broken_pickle_is_bad_input_with_the_files_name(data: bytes) -> None:
    with pytest.raises(BadInputError, match="the/file"):
        read_pickle(data, "the/file")


def test_deep_nesting_ends_in_an_error_or_a_value_but_not_in_a_crash() -> None:
    deep = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    code = (
        "import sys; from ckptbridge.converters.pickles import read_pickle; read_pickle(sys.stdin.buffer.read(), 'x')"
    )
    done = subprocess.run([sys.executable, "-c", code], input=deep, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-300:]
