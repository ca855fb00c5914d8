"""Whether a resumed run is still of the model that it began with: its sizes, its config.json, its weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import xxhash

from ckptbridge.converters.errors import BadInputError, told
from ckptbridge.converters.model import Model
from ckptbridge.converters.tensors import Checkpoint
from ckptbridge.trainer.recipe import ModelSection

_UPCYCLE, _DECODER, _CONFIG, _MADE = "model.upcycle", "decoder", "config.json", "the made config.json"
_OF_THE_FILE = frozenset(("dtype", "torch_dtype", "transformers_version", "_name_or_path"))
"""What config.json says of the file it was saved in; the trainer writes its own dtype."""
_SAMPLED = 32
"""Tensors whose first rows tell one set of weights from another: a few reads, however large the model."""
_ABSENT = "absent"


def describe_upcycling(section: ModelSection) -> dict[str, Any]:
    """What the recipe says of how the model is made: known before anything is opened. Texts count by content."""
    if section.upcycle is None:
        return {_UPCYCLE: None}
    said = section.upcycle.model_dump(mode="json", exclude={"others", "probe", "report"})
    for part, key in ((said, "calibrate"), (said, "prompts"), (said["distill"] or {}, "text")):
        if part.get(key) and (path := Path(part[key])).is_file():
            part[key] = f"text {xxhash.xxh3_64(path.read_bytes()).hexdigest()}"
    return {_UPCYCLE: said}


def describe_model(source: Model, section: ModelSection) -> dict[str, Any]:
    """Plain values by which a later process knows the model, wherever it then lies; rows of weights are read."""
    config = asdict(source.config)
    if source.config.rope_scaling is not None:
        config["rope_scaling"]["kind"] = type(source.config.rope_scaling).__name__
    described = {
        **describe_upcycling(section),
        "family": source.family.name,
        _DECODER: config,
        _CONFIG if _is_given(source) else _MADE: source.hf_config,
        "a digest of model.init_from's weights": [_digest(model.tensors) for model in source.opened],
    }
    return json.loads(json.dumps(described))


def refuse_other_model(was: Mapping[str, Any], now: Mapping[str, Any], checkpoint: Path) -> None:
    """Raise BadInputError naming every field of `now` that was another one when the checkpoint was written.

    Both are what `describe_model` gave, or a part of it; what the checkpoint's version did not write is not compared.
    """
    different = [line for part in now if part in was for line in _differences(part, was[part], now[part])]
    if different:
        raise BadInputError(
            f"{checkpoint}: the run in this folder is of another model than the recipe now asks for:\n  "
            + "\n  ".join(different)
            + "\nrestore the recipe's model section, or start in another run_folder"
        )


def _differences(name: str, was: Any, now: Any) -> Iterator[str]:
    """A line for each value that differs, sections value by value."""
    if isinstance(was, dict) and isinstance(now, dict):
        before, after = cast(dict[str, Any], was), cast(dict[str, Any], now)
        # A field that only one version of this program writes is no difference; in a given config.json it is one.
        is_given = name.startswith(_CONFIG)
        keys = before.keys() | after.keys() if is_given else before.keys() & after.keys()
        for key in sorted(keys - _OF_THE_FILE):
            inner = key if name == _DECODER else f"{name}: {key}" if name in (_CONFIG, _MADE) else f"{name}.{key}"
            yield from _differences(inner, before.get(key, _ABSENT), after.get(key, _ABSENT))
    elif json.dumps(was, sort_keys=True) != json.dumps(now, sort_keys=True):
        yield f"{name} was {told(was)}, now it is {told(now)}"


def _is_given(source: Model) -> bool:
    """Whether the model came with its config.json: that of a mixture, or of a checkpoint with args alone, is made."""
    return source.hf_config_file is not None or (source.format == "hf" and not source.made_of)


def _digest(tensors: Checkpoint) -> str:
    """Of the first rows of some tensors, by Megatron-Core's names: the same in every format of the model."""
    names, digest = sorted(tensors), xxhash.xxh3_64()
    for name in names[:: max(1, len(names) // _SAMPLED)]:
        digest.update(name.encode())
        digest.update(tensors[name].read_rows(0, 1).float().numpy().tobytes())
    return digest.hexdigest()
