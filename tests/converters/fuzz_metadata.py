"""Mutations of what a Megatron checkpoint says about itself: `.metadata`, the archives in `.distcp`, the saved args."""

from __future__ import annotations

import io
import pickle
import random
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from tests.converters.fuzz_archives import mutate_archive
from tests.converters.fuzz_bytes import BYTES, INTEGERS, STRINGS, places

ODD_VALUES = (
    *INTEGERS,
    *STRINGS,
    *(None, True, 1.5, float("nan"), float("inf"), (), [], {}, b"x", range(10**9), (10**9,) * 70, (2**64,) * 5000),
    *(range(10**12), "9" * 10_000, (((((),),),),), [[[[]]]], {"a": {}}, {1, 2}, slice(None), 1j, torch.float32),
)
"""Values that no field of a checkpoint asks for."""
ODD_KEYS = (*STRINGS, 0, 1, -1, 2**64, None, True, ("a", 1), 1.5)


def metadata_of(files: dict[str, bytes]) -> tuple[str, Metadata]:
    """The name of `.metadata` and its object; the file is ours, so it may be loaded."""
    name = next(name for name in files if name.endswith(".metadata"))
    return name, pickle.loads(files[name])


def _tensor_keys(metadata: Metadata) -> list[str]:
    return [key for key, entry in metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)]


def _shifted(values: tuple[int, ...], rng: random.Random) -> tuple[Any, ...]:
    made: list[Any] = list(values)
    how = rng.randrange(5)
    at = rng.randrange(len(made)) if made else 0
    if not made or how == 0:
        return (*made, rng.choice(INTEGERS))
    if how == 1:
        return tuple(made[:-1])
    if how == 2:
        made[at] = rng.choice(ODD_VALUES)
    elif how == 3:
        made[at] += rng.choice((1, -1))
    else:
        return tuple(made[::-1])
    return tuple(made)


def mutate_metadata(metadata: Metadata, rng: random.Random) -> str:
    """Change the object in place; the name of what was done."""
    key = rng.choice(_tensor_keys(metadata))
    entry: Any = metadata.state_dict_metadata[key]
    at = rng.randrange(len(entry.chunks))
    chunk = entry.chunks[at]
    index = MetadataIndex(key, chunk.offsets)
    info: Any = metadata.storage_data[index]
    how = rng.randrange(16)
    if how <= 1:
        offsets, sizes = chunk.offsets, chunk.sizes
        if how == 0:
            offsets = _shifted(tuple(offsets), rng)
            if rng.random() < 0.5 and all(type(n) is int and abs(n) < 2**63 for n in offsets):
                metadata.storage_data[MetadataIndex(key, offsets)] = info
        else:
            sizes = _shifted(tuple(sizes), rng)
        entry.chunks[at] = ChunkStorageMetadata(offsets=offsets, sizes=sizes)  # type: ignore[arg-type]
        return "chunk out of place"
    if how == 2:
        entry.chunks.append(rng.choice((chunk, rng.choice(entry.chunks), None, 7)))
        return "chunk twice"
    if how == 3:
        del entry.chunks[at]
        return "chunk missing"
    if how == 4:
        entry.chunks[at] = entry.chunks[rng.randrange(len(entry.chunks))]
        return "chunk twice, another missing"
    if how == 5:
        entry.size = _shifted(tuple(entry.size), rng)
        return "size of a tensor"
    if how == 6:
        entry.properties.dtype = rng.choice((torch.float64, torch.float16, torch.int8, torch.complex64, *ODD_VALUES))
        return "dtype of a tensor"
    if how <= 8:
        name = rng.choice(("relative_path", "offset", "length"))
        other: Any = rng.choice(list(metadata.storage_data.values()))
        setattr(info, name, rng.choice((getattr(other, name), *ODD_VALUES)))
        return "place of a chunk"
    if how == 9:
        other_index: Any = rng.choice(list(metadata.storage_data))
        held = metadata.storage_data
        held[index], held[other_index] = held[other_index], held[index]
        return "places exchanged"
    if how == 10:
        del metadata.storage_data[index]
        return "place missing"
    if how == 11:
        renamed = rng.choice((*STRINGS, key + "x", rng.choice(_tensor_keys(metadata)), None, 7, ("a",)))
        metadata.state_dict_metadata[renamed] = metadata.state_dict_metadata.pop(key)
        return "key renamed"
    if how == 12:
        del metadata.state_dict_metadata[key]
        return "key missing"
    if how == 13:
        metadata.state_dict_metadata[key] = rng.choice((BytesStorageMetadata(), *ODD_VALUES))
        return "entry of another kind"
    if how == 14:
        setattr(entry, rng.choice(("chunks", "size", "properties")), rng.choice(ODD_VALUES))
        return "entry of another kind"
    setattr(metadata, rng.choice(("state_dict_metadata", "storage_data", "version")), rng.choice(ODD_VALUES))
    return "metadata of another kind"


def mutate_blob(files: dict[str, bytes], rng: random.Random) -> tuple[str, dict[str, bytes]]:
    """One archive of a `.distcp` file changed; where it is no longer as long, it is moved behind the others."""
    name, metadata = metadata_of(files)
    folder = name.removesuffix(".metadata")
    info: Any = rng.choice(list(metadata.storage_data.values()))
    file = folder + info.relative_path
    data = files[file]
    blob = data[info.offset : info.offset + info.length]
    kind, made = mutate_archive(blob, rng)
    if len(made) == len(blob):
        return kind, {file: data[: info.offset] + made + data[info.offset + info.length :]}
    for other in metadata.storage_data.values():
        if (other.relative_path, other.offset) == (info.relative_path, info.offset) and other is not info:
            other.offset, other.length = len(data), len(made)
    info.offset, info.length = len(data), len(made)
    return kind, {file: data + made, name: pickle.dumps(metadata)}


def mutate_common(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """An item of common.pt or of a legacy file, an argument or a model, with a value that is not asked for."""
    state = torch.load(io.BytesIO(data), weights_only=False)  # ours
    if "args" not in state or rng.random() < 0.3:
        kind = _mutate_tree(state, rng)
        out = io.BytesIO()
        torch.save(state, out)
        return kind, out.getvalue()
    args = vars(state["args"])
    if "model" in state and rng.random() < 0.5:
        kind = _mutate_model(state, rng)
    elif rng.random() < 0.85:
        name = rng.choice(list(args))
        if rng.random() < 0.1:
            del args[name]
        else:
            args[name] = rng.choice(ODD_VALUES)
        kind = "an argument"
    else:
        state[rng.choice(list(state))] = rng.choice((*ODD_VALUES, torch.ones(3)))
        kind = "a common item"
    out = io.BytesIO()
    torch.save(state, out)
    return kind, out.getvalue()


def _mutate_tree(state: dict[Any, Any], rng: random.Random) -> str:
    """Any entry of nested dictionaries and lists: the optimizer's groups and buffers, the scheduler."""
    path = rng.choice(list(places({key: value for key, value in state.items() if key != "model"})))
    holder: Any = state
    for key in path[:-1]:
        holder = holder[key]
    key, how = path[-1], rng.randrange(4)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[rng.choice((*ODD_KEYS, *holder))] = holder.pop(key)
    elif how == 2 and isinstance(holder[key], torch.Tensor):
        flat = holder[key].reshape(-1)
        holder[key] = rng.choice((flat[:-1], flat.double(), flat.half(), torch.cat([flat, flat]), flat.reshape(1, -1)))
    else:
        holder[key] = rng.choice((*ODD_VALUES, torch.ones(3), {key: holder[key]}, [holder[key]]))
    return "an entry of the optimizer or the common state"


def _mutate_model(state: dict[str, Any], rng: random.Random) -> str:
    """A legacy rank's model: keys renamed, lost or exchanged, tensors of other shapes, dtypes and kinds."""
    model, name = state["model"], "model"
    while isinstance(model, dict) and isinstance(next(iter(model.values())), dict):  # the oldest files nest
        model = model[rng.choice([key for key, value in model.items() if isinstance(value, dict)])]
    key, other = (rng.choice(list(model)) for _ in range(2))
    value = model[key]
    how = rng.randrange(8)
    if how == 0:
        del model[key]
    elif how == 1:
        numbers = ("9", "-1", "99999999999", "9" * 5000, "01", "\u0661")
        model[rng.choice((*STRINGS, key + "x", key.replace("0", rng.choice(numbers)), 7, None, ("a",)))] = model.pop(
            key
        )
    elif how == 2:
        model[key], model[other] = model[other], model[key]
    elif how == 3 and isinstance(value, torch.Tensor):
        flat = value.reshape(-1)
        model[key] = rng.choice(
            (
                flat,
                flat[:-1],
                value.mT if value.ndim > 1 else flat[:0],
                value[..., :-1],
                value.unsqueeze(0),
                value.expand(2, *value.shape),
            )
        )
    elif how == 4 and isinstance(value, torch.Tensor):
        model[key] = value.to(rng.choice((torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.complex64)))
    elif how == 5:
        model[key] = rng.choice(ODD_VALUES)
    elif how == 6:
        state[rng.choice(("model", "model0", "model1", "model9", "model99999999"))] = state.pop(name)
    else:
        state["model"] = rng.choice((*ODD_VALUES, {key: value}, {"a": model}, [model]))
    return "a model of a rank"


def mutate_megatron(files: dict[str, bytes], name: str, rng: random.Random) -> tuple[str, dict[str, bytes]] | None:
    """A change that only this file's kind can have; None where bytes are all there is to change."""
    if name.endswith(".metadata"):
        _, metadata = metadata_of(files)
        kind = mutate_metadata(metadata, rng)
        return kind, {name: pickle.dumps(metadata)}
    if name.endswith(".distcp"):
        return mutate_blob(files, rng)
    if name.endswith(".txt"):
        word = rng.choice((*STRINGS, *map(str, INTEGERS), "release\n\n", "1 2", "\u0661", "release/../release"))
        return "tracker", {name: word.encode("utf-8", "surrogatepass")}
    if name.endswith(".pt") and rng.random() < 0.6:
        kind, made = mutate_common(files[name], rng)
        return kind, {name: made}
    return None


def mutate_bytes(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    kind = rng.choice(list(BYTES))
    return kind, BYTES[kind](data, rng)
