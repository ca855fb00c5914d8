"""Ways to upcycle that compute the dense model's own function, and what is planted to differ from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ckptbridge.converters.convert import ConvertOptions, TargetFormat, plan_conversion
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import Model
from ckptbridge.converters.upcycling.spec import UpcycleSpec

TOLERANCE = 1e-5
"""Of fp32 logits, absolute: what another order of summation costs is below 3e-6 in these models."""
SOURCES = ("llama", "mistral", "qwen2", "qwen3", "nemotron")


def _grid(groups: int, granularity: int, topk: int) -> dict[str, int]:
    """He et al.'s E, G, T."""
    return {"num_experts": groups * granularity, "granularity": granularity, "topk": topk}


_SIGMOID: dict[str, Any] = {"router": "sigmoid"}

EXACT: dict[str, dict[str, Any]] = {
    "copy E8G1T2": _grid(8, 1, 2),
    "E4G4T4": _grid(4, 4, 4),
    "E4G4T8": _grid(4, 4, 8),
    "E8G8T8": _grid(8, 8, 8),
    "E3G3T6": _grid(3, 3, 6),
    "E1G4T4": _grid(1, 4, 4),
    "down": _grid(4, 4, 4) | {"scaling": "down"},
    "the published cube root of one": _grid(4, 1, 2) | {"scaling": "paper"},
    "permute": _grid(4, 4, 8) | {"permute": True},
    "shared partition": _grid(4, 2, 4) | {"shared": "partition"},
    "shared partition of a quarter": _grid(4, 2, 2) | {"shared": "partition", "shared_width": 24},
    "shared overlap": _grid(4, 2, 4) | {"shared": "overlap", "shared_weight": 0.25},
    "first layers dense": _grid(4, 2, 2) | {"layers": "2:"},
    "every second layer": _grid(4, 2, 2) | {"layers": "1::2"},
    "pre-softmax of zeros": _grid(4, 4, 4) | {"router": "pre-softmax", "router_std": 0.0},
    "pre-softmax of zeros, copies": _grid(8, 1, 2) | {"router": "pre-softmax", "router_std": 0.0},
    "pre-softmax, every expert": _grid(4, 4, 16) | {"router": "pre-softmax"},
    "sigmoid": _grid(4, 4, 8) | _SIGMOID,
    "sigmoid E3G3T6": _grid(3, 3, 6) | _SIGMOID,
    "sigmoid, copies": _grid(8, 1, 2) | _SIGMOID,
    "sigmoid, down": _grid(4, 4, 4) | _SIGMOID | {"scaling": "down"},
    "sigmoid, groups": _grid(4, 2, 4) | _SIGMOID | {"router_groups": True},
    "sigmoid, groups E4G4T8": _grid(4, 4, 8) | _SIGMOID | {"router_groups": True},
    "sigmoid, shared partition": _grid(4, 2, 4) | _SIGMOID | {"shared": "partition"},
    "sigmoid, shared overlap": _grid(4, 2, 2) | _SIGMOID | {"shared": "overlap", "shared_weight": 0.5},
    "sigmoid, first layer dense": _grid(4, 2, 2) | _SIGMOID | {"layers": "1:"},
    "sigmoid, permute": _grid(4, 4, 4) | _SIGMOID | {"permute": True},
}
"""By name; the routers' spread is one that makes every choice and weight count, unless a case names another."""

INEXACT: dict[str, dict[str, Any]] = {
    "the published cube root": _grid(4, 4, 4) | {"scaling": "paper"},
    "the published cube root, sigmoid": _grid(4, 4, 4) | _SIGMOID | {"scaling": "paper"},
    "the published cube root of a half": _grid(4, 1, 2) | {"scaling": "paper", "shared": "overlap"},
    "no scale": _grid(4, 4, 4) | {"scaling": "none"},
    "no scale, pre-softmax copies": _grid(8, 1, 2) | {"router": "pre-softmax", "router_std": 0.0, "scaling": "none"},
    "pre-softmax, not zero": _grid(4, 4, 4) | {"router": "pre-softmax", "router_std": 0.02},
    "pre-softmax of zeros, permute": _grid(4, 4, 4) | {"router": "pre-softmax", "router_std": 0.0, "permute": True},
    "topk no multiple of G": _grid(4, 4, 6) | {"allow_inexact": True},
    "router noise": _grid(4, 4, 4) | {"router_noise": 0.1, "allow_inexact": True},
    "noise": _grid(4, 1, 2) | {"noise": 0.05},
    "drop": _grid(4, 1, 2) | {"method": "drop", "drop_ratio": 0.25},
}
"""What the package itself says of these is that they differ."""


OF_MISTRAL = ("copy E8G1T2", "E4G4T8", "shared partition", "first layers dense", "pre-softmax of zeros")
"""What is done to the source that is Llama but for its window."""


def goes_with(name: str, kind: str) -> bool:
    """Whether a case is done to a source."""
    return name != "mistral" or kind in OF_MISTRAL


def spec_of(values: dict[str, Any], **more: Any) -> UpcycleSpec:
    return UpcycleSpec(**{"seed": 3, "router_std": 0.3, **values, **more})


def written(model: Model, target: Path, to: TargetFormat = "hf", **options: Any) -> Path:
    execute(plan_conversion(model, target, to, ConvertOptions(workers=1, **options)))
    return target
