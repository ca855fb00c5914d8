"""Rotary position embeddings in Hugging Face's order: the two halves of a head turn against each other.

Shapes: S sequence, D head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ckptbridge.converters.model_config import Llama3RopeScaling, ModelConfig


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of each pair of channels, fp32 [D/2], on the CPU."""
    exponents = torch.arange(0, config.kv_channels, 2, device="cpu").float() / config.kv_channels
    frequencies = 1.0 / (config.rotary_base**exponents)
    return frequencies if config.rope_scaling is None else _llama3(frequencies, config.rope_scaling)


def _llama3(frequencies: Tensor, scaling: Llama3RopeScaling) -> Tensor:
    """Slow channels are divided by the factor, fast ones kept, and those between are blended."""
    turns = scaling.original_max_position_embeddings / (2 * math.pi / frequencies)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def rope_table(config: ModelConfig, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions [0, length), each [S, D/2], computed in fp32 and then rounded to `dtype`."""
    positions = torch.arange(length, device=device, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(config).to(device))
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    """Turn the heads x [..., S, D] by the angles of their positions."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos_SD - second * sin_SD, second * cos_SD + first * sin_SD), -1)
