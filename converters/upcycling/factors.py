"""What each matrix of an expert is multiplied by, so that the weighted sum of experts is the dense MLP's output.

If every token meets each neuron through experts whose weights sum to w, an expert's output has to be multiplied by
s = 1 / w. SwiGLU is linear in up_proj and down_proj but not in gate_proj: s is split between those two. The published
cube root on all three (arXiv 2410.07524, eq. 2; Megatron-Core) is exact for squared ReLU alone, and off by 13-26 % of
a SwiGLU's output. Factors are powers of two where s is one, so that bf16 weights lose nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.upcycling.spec import UpcycleSpec


@dataclass(frozen=True, slots=True)
class Factors:
    """Of gate_proj (1 where there is none), of up_proj, of down_proj."""

    gate: float = 1.0
    up: float = 1.0
    down: float = 1.0


def output_scale(spec: UpcycleSpec) -> float:
    """s of a resolved spec: what each expert's output is multiplied by.

    Exact for weights that sum to one. Softmax weights that are not divided by their sum are 1/N on average only for
    a router of zeros: then s = E G^2 / T.
    """
    g = spec.granularity
    if spec.router == "pre-softmax":
        return spec.groups * g * g / spec.chosen
    return float(g)


def scaling_factor(spec: UpcycleSpec) -> float | None:
    """What a sigmoid router multiplies its weights by: it takes the whole of s, and no weight is changed."""
    if spec.router != "sigmoid" or spec.scaling != "exact":
        return None
    return None if spec.granularity == 1 else float(spec.granularity)


def split_scale(scale: float) -> tuple[float, float]:
    """(factor of up_proj, factor of down_proj) with product `scale`; the first is the power of two next to its root."""
    up = 2.0 ** math.floor(math.log2(scale) / 2)
    return up, scale / up


def expert_factors(spec: UpcycleSpec, dense: ModelConfig, calibrated: float = 1.0) -> Factors:
    """The factors of a routed expert; `calibrated` is what a measurement multiplies s by."""
    weight = calibrated * (1 - spec.shared_weight if spec.shared == "overlap" else 1.0)
    if spec.scaling == "none" or scaling_factor(spec) is not None:
        return Factors(down=weight)
    scale = output_scale(spec) * weight
    if spec.scaling == "down" or scale <= 0:
        return Factors(down=scale)
    if spec.scaling == "paper":
        return _published(scale, dense)
    if dense.gated_linear_unit:
        up, down = split_scale(scale)
        return Factors(up=up, down=down)
    if dense.activation_func == "squared_relu":
        up = 2.0 ** math.floor(math.log2(scale) / 3)
        return Factors(up=up, down=scale / (up * up))
    return Factors(down=scale)


def _published(scale: float, dense: ModelConfig) -> Factors:
    """The cube root on every matrix; the square root for two matrices around another activation."""
    if dense.gated_linear_unit:
        root = scale ** (1 / 3)
        return Factors(gate=root, up=root, down=root)
    root = scale ** (1 / 3 if dense.activation_func == "squared_relu" else 1 / 2)
    return Factors(up=root, down=root)


def shared_factors(spec: UpcycleSpec, *, is_gated: bool) -> Factors:
    """The factors of the shared expert; a sigmoid whose weights are zero halves what passes it."""
    weight = spec.shared_weight if spec.shared == "overlap" else 1.0
    return Factors(down=weight * (2.0 if is_gated else 1.0))
