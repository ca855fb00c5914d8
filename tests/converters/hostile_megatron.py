"""Makers of bad Megatron checkpoints: each breaks one thing and says which words a refusal must hold."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from tests.converters.hostile import Bad, edit_json

TRACKER = "latest_checkpointed_iteration.txt"


def edit_metadata(folder: Path, change: Callable[[Metadata], Any]) -> None:
    """Edit `.metadata`; what `change` returns (if anything) is written in its place."""
    file = folder / "release" / ".metadata"
    metadata = pickle.loads(file.read_bytes())  # ours, made by the test
    file.write_bytes(pickle.dumps(change(metadata) or metadata))


def edit_common(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Edit `common.pt`, which a reader prefers."""
    file = folder / "release" / "common.pt"
    state = torch.load(file, weights_only=False)  # ours, made by the test
    torch.save(change(state) or state, file)


def edit_args(**changes: Any) -> Callable[[Path], None]:
    def change(state: dict[str, Any]) -> None:
        vars(state["args"]).update(changes)

    return lambda folder: edit_common(folder, change)


_FC1 = "decoder.layers.mlp.linear_fc1.weight"


def _fc1(metadata: Metadata) -> TensorStorageMetadata:
    entry = metadata.state_dict_metadata[_FC1]
    assert isinstance(entry, TensorStorageMetadata)
    return entry


def _chunk(**changes: tuple[int, ...]) -> Callable[[Path], None]:
    """Change the first chunk of the first layer's fc1 in the metadata."""

    def change(metadata: Metadata) -> None:
        old = _fc1(metadata).chunks[0]
        values = {"offsets": old.offsets, "sizes": old.sizes} | {k: torch.Size(v) for k, v in changes.items()}
        _fc1(metadata).chunks[0] = ChunkStorageMetadata(**values)
        info = metadata.storage_data.pop(MetadataIndex(_FC1, old.offsets))
        metadata.storage_data[MetadataIndex(_FC1, values["offsets"])] = info

    return lambda folder: edit_metadata(folder, change)


def _place(**changes: Any) -> Callable[[Path], None]:
    """Change where the first chunk of fc1 is said to be stored."""

    def change(metadata: Metadata) -> None:
        index = next(i for i in metadata.storage_data if i.fqn == _FC1)
        for name, value in changes.items():
            setattr(metadata.storage_data[index], name, value)

    return lambda folder: edit_metadata(folder, change)


def _write(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


def _truncate(name: str, keep: Callable[[int], int]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: keep(len(data))])

    return spoil


def _overwrite_archive(folder: Path) -> None:
    """Zeros over the archive of one chunk: seen when its bytes are wanted."""
    metadata = pickle.loads((folder / "release" / ".metadata").read_bytes())
    index = next(i for i in metadata.storage_data if i.fqn == _FC1)
    info = metadata.storage_data[index]
    with (folder / "release" / info.relative_path).open("r+b") as file:
        file.seek(info.offset)
        file.write(bytes(info.length))


def _swap_archives(folder: Path) -> None:
    """A chunk is said to lie where another, of another shape, lies."""

    def change(metadata: Metadata) -> None:
        index = next(i for i in metadata.storage_data if i.fqn == _FC1)
        other = next(i for i in metadata.storage_data if i.fqn == "decoder.final_layernorm.weight")
        metadata.storage_data[index] = metadata.storage_data[other]

    edit_metadata(folder, change)


def _chunk_twice(metadata: Metadata) -> None:
    """Two chunks cover the first rows, none the last: the count of elements is right."""
    chunks = _fc1(metadata).chunks
    chunks[1] = chunks[0]


def _common_object(value: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        torch.save(value, folder / "release" / "common.pt")

    return spoil


def _no_args(folder: Path) -> None:
    edit_common(folder, lambda state: state.pop("args") and None)
    for file in (folder / "hf").iterdir():
        file.unlink()
    (folder / "hf").rmdir()


def _without_hf(**changes: Any) -> Callable[[Path], None]:
    """The config has to be read from the args."""

    def spoil(folder: Path) -> None:
        edit_args(**changes)(folder)
        for file in (folder / "hf").iterdir():
            file.unlink()
        (folder / "hf").rmdir()

    return spoil


def _rename_key(folder: Path) -> None:
    def change(metadata: Metadata) -> None:
        metadata.state_dict_metadata["decoder.layers.mlp.linear_fc9.weight"] = metadata.state_dict_metadata.pop(_FC1)
        for index in [i for i in metadata.storage_data if i.fqn == _FC1]:
            moved = MetadataIndex("decoder.layers.mlp.linear_fc9.weight", index.offset)
            metadata.storage_data[moved] = metadata.storage_data.pop(index)

    edit_metadata(folder, change)


class _Runs:
    def __reduce__(self) -> Any:
        return (print, ("it ran",))


_META, _DISTCP = "release/.metadata", "release/__0_0.distcp"

TORCH_DIST: dict[str, Bad] = {
    "tracker naming a missing folder": Bad("llama", _write(TRACKER, b"1000"), (TRACKER, "1000", "iter_0001000")),
    "tracker of garbage": Bad("llama", _write(TRACKER, b"newest, please"), (TRACKER, "newest")),
    "tracker pointing elsewhere": Bad("llama", _write(TRACKER, b"../release"), (TRACKER, "../release")),
    "tracker that is empty": Bad("llama", _write(TRACKER, b""), (TRACKER,)),
    "tracker of bytes": Bad("llama", _write(TRACKER, b"\xff\xfe\x00"), (TRACKER,)),
    "metadata.json missing": Bad(
        "llama", lambda d: (d / "release/metadata.json").unlink(), ("metadata.json", "incomplete")
    ),
    "metadata.json of another backend": Bad(
        "llama", _write("release/metadata.json", b'{"sharded_backend": "zarr"}'), ("metadata.json", "zarr")
    ),
    ".metadata missing": Bad("llama", lambda d: (d / _META).unlink(), (".metadata", "missing")),
    ".metadata empty": Bad("llama", _write(_META, b""), (".metadata",)),
    ".metadata cut": Bad("llama", _truncate(_META, lambda n: n // 2), (".metadata",)),
    ".metadata cut by one": Bad("llama", _truncate(_META, lambda n: n - 1), (".metadata",)),
    ".metadata of garbage": Bad("llama", _write(_META, b"\x00garbage" * 99), (".metadata",)),
    ".metadata of another object": Bad("llama", _write(_META, pickle.dumps({"a": 1})), (".metadata", "Metadata")),
    ".metadata that runs code": Bad("llama", _write(_META, pickle.dumps(_Runs())), (".metadata", "print")),
    ".metadata without places": Bad(
        "llama", lambda d: edit_metadata(d, lambda m: setattr(m, "storage_data", None)), (".metadata",)
    ),
    ".metadata without tensors": Bad(
        "llama", lambda d: edit_metadata(d, lambda m: setattr(m, "state_dict_metadata", {})), ("missing",)
    ),
    ".metadata with a list for tensors": Bad(
        "llama", lambda d: edit_metadata(d, lambda m: setattr(m, "state_dict_metadata", [1])), (".metadata",)
    ),
    ".metadata with places of words": Bad(
        "llama", lambda d: edit_metadata(d, lambda m: m.storage_data.update({"a": "b"})), (".metadata",)
    ),
    "a size that is null": Bad(
        "llama", lambda d: edit_metadata(d, lambda m: setattr(_fc1(m), "size", None)), (".metadata", _FC1)
    ),
    "a dtype that is a word": Bad(
        "llama",
        lambda d: edit_metadata(d, lambda m: setattr(_fc1(m).properties, "dtype", "float32")),
        (".metadata", _FC1),
    ),
    "a place that is a word": Bad("llama", _place(offset="0"), (".metadata", _FC1)),
    ".distcp missing": Bad("llama", lambda d: (d / _DISTCP).unlink(), ("__0_0.distcp", "missing")),
    ".distcp empty": Bad("llama", _truncate(_DISTCP, lambda n: 0), ("__0_0.distcp", "truncated")),
    ".distcp cut in half": Bad("llama", _truncate(_DISTCP, lambda n: n // 2), ("__0_0.distcp", "truncated")),
    ".distcp in another folder": Bad("llama", _place(relative_path="../../x.distcp"), (_FC1, "../../x.distcp")),
    ".distcp by absolute path": Bad("llama", _place(relative_path="/etc/passwd"), (_FC1, "/etc/passwd")),
    ".distcp that is a number": Bad("llama", _place(relative_path=7), (_FC1,)),
    "a chunk outside its tensor": Bad("llama", _chunk(offsets=(0, 150, 0)), (_FC1, "outside", "150")),
    "a chunk before its tensor": Bad("llama", _chunk(offsets=(-1, 0, 0)), (_FC1, "outside", "-1")),
    "a chunk of other axes": Bad("llama", _chunk(offsets=(0, 0)), (_FC1,)),
    "a chunk that is too small": Bad("llama", _chunk(sizes=(1, 95, 64)), (_FC1, "elements")),
    "a chunk twice and another not at all": Bad("llama", lambda d: edit_metadata(d, _chunk_twice), (_FC1,)),
    "a chunk that is stored nowhere": Bad(
        "llama",
        lambda d: edit_metadata(
            d, lambda m: m.storage_data.pop(next(i for i in m.storage_data if i.fqn == _FC1)) and None
        ),
        (_FC1, "nowhere"),
    ),
    "a chunk with a negative length": Bad("llama", _place(length=-5), (_FC1,)),
    "a key that nobody knows": Bad("llama", _rename_key, ("linear_fc1", "linear_fc9")),
    "common.pt cut": Bad("llama", _truncate("release/common.pt", lambda n: n - 30), ("common.pt",)),
    "common.pt of garbage": Bad("llama", _write("release/common.pt", b"x" * 500), ("common.pt",)),
    "common.pt that is a list": Bad("llama", _common_object([1, 2]), ("common state",)),
    "common.pt that runs code": Bad("llama", _common_object({"a": _Runs()}), ("common.pt", "print")),
    "neither args nor config.json": Bad("llama", _no_args, ("args", "--hf-config")),
    "args without layers": Bad("llama", _without_hf(num_layers=None), ("num_layers",)),
    "args of another norm": Bad("llama", _without_hf(normalization="LayerNorm"), ("normalization", "LayerNorm")),
    "args with a word for a number": Bad("llama", _without_hf(hidden_size="wide"), ("release", "hidden_size")),
    "args of another number of layers": Bad("llama", edit_args(num_layers=5), ("num_layers", "5", "4", "config.json")),
    "args of another epsilon": Bad(
        "llama", edit_args(norm_epsilon=1e-6, layernorm_epsilon=1e-6), ("layernorm_epsilon", "1e-06", "1e-05")
    ),
    "args of another rope": Bad("llama", edit_args(rotary_base=5), ("rotary_base", "5.0", "10000.0")),
    "args with rope scaling": Bad("llama", edit_args(use_rope_scaling=True), ("rope_scaling",)),
    "args without rope scaling": Bad("llama_rope_scaled", edit_args(use_rope_scaling=False), ("rope_scaling",)),
    "args of another router": Bad(
        "mixtral", edit_args(moe_router_pre_softmax=True), ("moe_router_pre_softmax", "True", "False")
    ),
    "args of another vocabulary": Bad("llama", edit_args(vocab_size=256), ("vocab_size", "256", "250")),
    "config.json of fewer tokens": Bad(
        "llama", lambda d: edit_json(d / "hf/config.json", vocab_size=200), ("vocab_size", "200", "250")
    ),
    "config.json of more tokens": Bad(
        "llama", lambda d: edit_json(d / "hf/config.json", vocab_size=300), ("vocab_size", "300")
    ),
    "config.json of another width": Bad(
        "llama", lambda d: edit_json(d / "hf/config.json", intermediate_size=64), (_FC1, "128", "192")
    ),
}
"""Refused on opening."""

LATE: dict[str, Bad] = {
    "an archive of zeros": Bad("llama", _overwrite_archive, (_FC1,)),
    "an archive of another shape": Bad("llama", _swap_archives, (_FC1, "[1, 96, 64]", "[64]")),
}
"""Seen only when the bytes are wanted: the target must not get its name."""
