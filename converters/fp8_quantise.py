"""Weights written in fp8 with one scale for each block of 128 x 128: DeepSeek-V3's form.

For a block with the largest magnitude m the scale is m / 448, the largest e4m3 number, and a code is the nearest one
to weight / scale, both in fp32. A block of zeros has the scale 1. Reading gives code * scale: off by at most a
sixteenth of the weight, or by scale / 1024 where that is more.

Weights that were fp8 in this form come back with the same codes; a scale is off by what rounding the block's largest
weight to the checkpoint's dtype in between cost (2 ** -8 of it for bf16, nothing beyond fp32's own for fp32), and
is the same from then on.

Shapes: R rows, C columns, of which B = ceil(C / 128) blocks lie side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.fp8_folder import QUANTIZATION_CONFIG, SCALE_SUFFIX
from ckptbridge.converters.mapping import Family, Move
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.tensors import Checkpoint, LazyTensor

BLOCK = 128
_LARGEST = 448.0
_ROWS_AT_A_TIME = 16


class _Scales(LazyTensor):
    """The scales [ceil(R / 128), B] of a matrix. `where` names it in errors."""

    dtype = torch.float32

    def __init__(self, weight: LazyTensor, where: str) -> None:
        self.weight, self.where = weight, where
        self.shape = (-(-weight.shape[0] // BLOCK), -(-weight.shape[1] // BLOCK))

    def bases(self) -> Sequence[LazyTensor]:
        return (self.weight,)

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Raises BadInputError when a weight is no finite number."""
        made = torch.empty(stop - start, self.shape[1])
        for band in range(start, stop):
            made[band - start] = self._scales_of(band)
        return made

    @property
    def work_row_nbytes(self) -> int:
        return _ROWS_AT_A_TIME * (self.weight.work_row_nbytes + 8 * self.weight.shape[1])

    def _scales_of(self, band: int) -> Tensor:
        height, width = self.weight.shape
        largest = torch.zeros(self.shape[1] * BLOCK)
        for at in range(band * BLOCK, min(height, (band + 1) * BLOCK), _ROWS_AT_A_TIME):
            part = self.weight.read_rows(at, min(height, (band + 1) * BLOCK, at + _ROWS_AT_A_TIME))
            largest[:width] = torch.maximum(largest[:width], part.abs().amax(0).float())  # nan stays nan
        scales = largest.view(-1, BLOCK).amax(1) / _LARGEST
        if not bool(scales.isfinite().all()):
            raise BadInputError(f"{self.where} holds NaN or infinity, for which a block of fp8 weights has no scale")
        return scales.masked_fill_(scales == 0, 1.0)


class _Codes(LazyTensor):
    """A matrix in e4m3, to be read with its scales."""

    dtype = torch.float8_e4m3fn

    def __init__(self, weight: LazyTensor, scales: _Scales) -> None:
        self.weight, self.scales, self.shape = weight, scales, weight.shape
        self._known = (-1, torch.empty(0))
        """A band of scales: rows are asked for in order, a few at a time."""

    def bases(self) -> Sequence[LazyTensor]:
        return (self.weight,)

    def read_rows(self, start: int, stop: int) -> Tensor:
        made = torch.empty(stop - start, self.shape[1], dtype=self.dtype)
        while start < stop:
            band = start // BLOCK
            end = min(stop, (band + 1) * BLOCK)
            spread = self._scales_of(band).repeat_interleave(BLOCK)[: self.shape[1]]
            at = len(made) - (stop - start)
            made[at : at + end - start] = (self.weight.read_rows(start, end).float() / spread).to(self.dtype)
            start = end
        return made

    @property
    def work_row_nbytes(self) -> int:
        return self.weight.work_row_nbytes + 9 * self.shape[1]

    def _scales_of(self, band: int) -> Tensor:
        known, scales = self._known
        if known != band:
            scales = self.scales.read_rows(band, band + 1)[0]
            self._known = (band, scales)
        return scales


def quantised(hf: Checkpoint, family: Family, config: ModelConfig, where: str) -> dict[str, LazyTensor]:
    """The tensors of a Hugging Face folder with the matrices of linear layers in fp8, their scales behind them.

    Embedding, output layer, routers and what joins the inputs of further prediction layers keep their dtype, as in
    DeepSeek-V3. Nothing is read. Raises NotSupportedError for a family whose files hold experts in stacks.
    """
    chosen = _chosen(family, config)
    made: dict[str, LazyTensor] = {}
    for name, tensor in hf.items():
        if name not in chosen:
            made[name] = tensor
            continue
        scales = _Scales(tensor, f"{where}: tensor {name!r}")
        made |= {name: _Codes(tensor, scales), name + SCALE_SUFFIX: scales}
    return made


def quantisation_config(hf: Checkpoint) -> dict[str, Any]:
    """What config.json says of such a folder: as DeepSeek-V3's, and which matrices are not fp8."""
    kept = [
        name for name, t in hf.items() if len(t.shape) == 2 and name.endswith(".weight") and t.dtype != _Codes.dtype
    ]
    return {
        QUANTIZATION_CONFIG: {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "modules_to_not_convert": [n.removesuffix(".weight") for n in kept if "embed_tokens" not in n],
            "quant_method": "fp8",
            "weight_block_size": [BLOCK, BLOCK],
        }
    }


def quantisation_note(hf: Checkpoint) -> str:
    """What a user should know of such a folder."""
    count = sum(isinstance(tensor, _Codes) for tensor in hf.values())
    return (
        f"{count} matrices are written as float8_e4m3fn with a scale for each {BLOCK} x {BLOCK} block: a weight is off "
        "by at most a sixteenth of itself, or by a 1024th of its block's scale"
    )


def _chosen(family: Family, config: ModelConfig) -> set[str]:
    chosen: set[str] = set()
    for move in family.moves(config):
        if move.is_stacked:
            raise NotSupportedError(
                f"fp8 in blocks has a scale for each block of a matrix, but {family.architecture} holds experts in "
                f"stacks: {move.hf[0]}. Write this family without --quantize"
            )
        if _is_linear(move):
            chosen |= {name for name, shape in zip(move.hf, move.hf_shapes, strict=True) if len(shape) == 2}
    return chosen


def _is_linear(move: Move) -> bool:
    *_, module, leaf = move.name.split(".")
    return module.startswith("linear_") and leaf == "weight"
