"""Rotary position embeddings in Hugging Face's order: the two halves of what turns in a head turn against each other.

Shapes: S sequence, D head dim, R the channels of a head that turn.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.rope_scaling import (
    LinearRopeScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    YarnRopeScaling,
)


def inverse_frequencies(config: ModelConfig, length: int, *, is_local: bool = False) -> Tensor:
    """Radians per position of each pair of channels, fp32 [R/2], on the CPU.

    `length` is that of the sequence, which LongRoPE asks for; `is_local` is for layers with a window.
    """
    if is_local and config.local_rotary_base is not None:
        return _plain(config.local_rotary_base, config.rotary_dim)
    frequencies, scaling = _plain(config.rotary_base, config.rotary_dim), config.rope_scaling
    match scaling:
        case None:
            return frequencies
        case Llama3RopeScaling():
            return _llama3(frequencies, scaling)
        case LinearRopeScaling():
            return frequencies / scaling.factor
        case YarnRopeScaling():
            return _yarn(frequencies, scaling, config)
        case LongRopeScaling():
            is_long = length > scaling.original_max_position_embeddings
            return frequencies / torch.tensor(scaling.long_factor if is_long else scaling.short_factor)


def attention_factor(config: ModelConfig) -> float:
    """What the scaling multiplies cosines and sines by, and so every score by its square."""
    scaling = config.rope_scaling
    if not isinstance(scaling, YarnRopeScaling | LongRopeScaling):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if isinstance(scaling, LongRopeScaling):
        stretch = config.max_position_embeddings / scaling.original_max_position_embeddings
        return math.sqrt(1 + max(0.0, math.log(stretch)) / math.log(scaling.original_max_position_embeddings))
    if scaling.mscale and scaling.mscale_all_dim:
        return magnitude(scaling.factor, scaling.mscale) / magnitude(scaling.factor, scaling.mscale_all_dim)
    return magnitude(scaling.factor, 1.0)


def rope_table(
    config: ModelConfig, length: int, device: torch.device, dtype: torch.dtype, *, is_local: bool = False
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions [0, length), each [S, R/2], computed in fp32 and then rounded to `dtype`."""
    positions = torch.arange(length, device=device, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(config, length, is_local=is_local).to(device))
    factor = 1.0 if is_local and config.local_rotary_base is not None else attention_factor(config)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def _plain(base: float, channels: int) -> Tensor:
    exponents = torch.arange(0, channels, 2, device="cpu").float() / channels
    return 1.0 / (base**exponents)


def _llama3(frequencies: Tensor, scaling: Llama3RopeScaling) -> Tensor:
    """Slow channels are divided by the factor, fast ones kept, and those between are blended."""
    turns = scaling.original_max_position_embeddings / (2 * math.pi / frequencies)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def _yarn(frequencies: Tensor, scaling: YarnRopeScaling, config: ModelConfig) -> Tensor:
    """Fast channels are kept, slow ones divided by the factor, and those between are blended along a ramp."""
    channels, base = config.rotary_dim, config.rotary_base

    def channel_that_turns(times: float) -> float:
        """Where on the scale of pairs a channel turns so many times within the first training's length."""
        length = scaling.original_max_position_embeddings
        return channels * math.log(length / (times * 2 * math.pi)) / (2 * math.log(base))

    low, high = channel_that_turns(scaling.beta_fast), channel_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, channels - 1)
    steps = torch.arange(len(frequencies), device="cpu", dtype=torch.float32)
    divided = ((steps - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequencies / scaling.factor * divided + frequencies * (1 - divided)


def magnitude(factor: float, times: float) -> float:
    """YaRN's measure of how much sharper attention has to be in a context that is `factor` times longer."""
    return 0.1 * times * math.log(factor) + 1.0 if factor > 1 else 1.0
