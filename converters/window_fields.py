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


@dataclass(frozen=True)
class SwitchedWindows(FieldRow):
    """Qwen's windows: `use_sliding_window` switches them on, `max_window_layers` says where.

    `missing` tells from a layer's number and `max_window_layers` whether it has the window where the file has no
    `layer_types`. None: the class has the window in every layer.
    """

    missing: Callable[[int, int], bool] | None

    @property
    def hf_names(self) -> tuple[str, ...]:
        return ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")

    def to_mcore(self, hf: Json) -> Json:
        if not hf.get("use_sliding_window"):
            if others := set(hf.get("layer_types") or ()) - {"full_attention"}:
                raise NotSupportedError(
                    f"config.json: layer_types holds {sorted(others)}, but use_sliding_window is not set"
                )
            return {"window_size": None, "window_layers": None}
        size, edge = hf.get("sliding_window", 4096), hf.get("max_window_layers", 28)
        if self.missing is None:
            if set(hf.get("layer_types") or ()) - {"sliding_attention"}:
                raise NotSupportedError("config.json: layer_types, which this class does not read, names other layers")
            return {"window_size": size, "window_layers": None}
        missing = self.missing
        return LayerWindows(missing=lambda layer: missing(layer, edge)).to_mcore(hf | {"sliding_window": size})

    def to_hf(self, config: ModelConfig) -> Json:
        if config.window_size is None:
            return {"use_sliding_window": False}
        written = LayerWindows(missing=config.has_window).to_hf(config)
        if self.missing is None:
            del written["layer_types"]
        return {"use_sliding_window": True, **written}


LAST_LAYERS = SwitchedWindows(missing=lambda layer, edge: layer >= edge)
EVERY_SECOND_LAYER = SwitchedWindows(missing=lambda layer, edge: layer < edge and layer % 2 == 0)
EVERY_LAYER = SwitchedWindows(missing=None)
