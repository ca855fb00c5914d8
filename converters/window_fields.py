"""The fields of config.json about attention windows that some layers have and others do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from ckptbridge.converters.errors import BadInputError, NotSupportedError, told
from ckptbridge.converters.fields import FieldRow, Json
from ckptbridge.converters.model_config import ModelConfig

_KINDS = {"sliding_attention": 1, "full_attention": 0}


@dataclass(frozen=True)
class LayerWindows(FieldRow):
    """`sliding_window`, and `layer_types` with a word for each layer.

    `missing` tells from a layer's number whether it has the window where the file has no `layer_types`.
    """

    missing: Callable[[int], bool]
    size: int | None = None
    """The window where the file names none."""

    @property
    def hf_names(self) -> tuple[str, ...]:
        return ("sliding_window", "layer_types")

    def to_mcore(self, hf: Json) -> Json:
        size = hf.get("sliding_window", self.size)
        count = hf["num_hidden_layers"]
        if type(count) is not int or not 0 < count <= 10_000:
            raise BadInputError(f"config.json: num_hidden_layers is {told(count)}")
        found: Any = hf.get("layer_types") or [
            "sliding_attention" if self.missing(layer) else "full_attention" for layer in range(count)
        ]
        words = cast(list[Any], found) if isinstance(found, list) else [found]
        if strange := [word for word in words if not isinstance(word, str) or word not in _KINDS]:
            raise NotSupportedError(f"config.json: layer_types holds {told(strange[0])}; known are {', '.join(_KINDS)}")
        layers = tuple(_KINDS[word] for word in words)
        if size is None or not any(layers):
            return {"window_size": None, "window_layers": None}
        return {"window_size": size, "window_layers": None if all(layers) and len(layers) == count else layers}

    def to_hf(self, config: ModelConfig) -> Json:
        kinds = {value: word for word, value in _KINDS.items()}
        layers = [kinds[config.has_window(layer)] for layer in range(config.num_layers)]
        return {"sliding_window": config.window_size, "layer_types": layers}
