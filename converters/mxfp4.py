"""Weights in MXFP4: four-bit numbers, 32 of which share a power of two. GPT-OSS is published so.

Beside `X_blocks` [E, R, G, 16], two numbers a byte, the lower four bits first, lies `X_scales` [E, R, G] with the
exponents, 127 added. X itself is [E, 32 G, R]: the rows of the blocks are its columns. Every number is exact in bf16.

Shapes: E experts, R rows, G groups of 32 columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.fp8_folder import QUANTIZATION_CONFIG, dtype_of, without_quantisation
from ckptbridge.converters.hf_folder import HfFolder
from ckptbridge.converters.tensors import LazyTensor, Stored, join_rows, reshaped, rows
from ckptbridge.converters.turned import turned

BLOCKS, SCALES = "_blocks", "_scales"
GROUP = 32
"""How many numbers share a scale."""
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_CHUNK_ELEMENTS = 1 << 17
_KNOWN = ("quant_method", "modules_to_not_convert", "dequantize")
"""Fields of quantization_config. Which tensors are quantised stands in the files."""


def _pairs() -> Tensor:
    """For each byte the two numbers of it, as one element of four bytes."""
    values = torch.tensor([*_VALUES, *(-value for value in _VALUES)], dtype=torch.bfloat16)
    byte = torch.arange(256)
    return torch.stack([values[byte & 15], values[byte >> 4]], dim=1).contiguous().view(torch.int32).flatten()


_PAIRS = _pairs()
_POWERS = torch.tensor([math.ldexp(1.0, exponent - 127) for exponent in range(255)])


class Mxfp4(LazyTensor):
    """A matrix [R, 32 G] out of its bytes [R, 16 G] and its scales [R, G]. `where` names the scales in errors."""

    def __init__(self, blocks: LazyTensor, scales: LazyTensor, dtype: torch.dtype, *, where: str) -> None:
        self.blocks, self.scales, self.dtype, self.where = blocks, scales, dtype, where
        self.shape = (blocks.shape[0], 2 * blocks.shape[1])

    def bases(self) -> Sequence[LazyTensor]:
        return self.blocks, self.scales

    def cast(self, dtype: torch.dtype) -> LazyTensor:
        return Mxfp4(self.blocks, self.scales, dtype, where=self.where)

    @property
    def work_row_nbytes(self) -> int:
        return self.row_nbytes + self.blocks.row_nbytes + self.scales.row_nbytes

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Raises BadInputError when a scale is no number."""
        made = torch.empty(stop - start, self.shape[1], dtype=self.dtype)
        if not made.numel():
            return made
        codes, exponents = self.blocks.read_rows(start, stop), self.scales.read_rows(start, stop)
        if (bad := exponents == 255).any():
            row, group = (int(n) for n in bad.nonzero()[0])
            raise BadInputError(
                f"{self.where}: the scale at row {start + row}, group {group} is 255, which stands for no number; copy "
                "or download the file again"
            )
        step = max(1, _CHUNK_ELEMENTS // self.shape[1])
        for at in range(0, stop - start, step):
            part = codes[at : at + step]
            pairs = _PAIRS.index_select(0, part.flatten().int()).view(torch.bfloat16).view(len(part), -1, GROUP)
            scales = _POWERS[exponents[at : at + step].int()]
            made[at : at + step] = (pairs * scales[:, :, None]).flatten(1)
        return made


def is_mxfp4(config: Mapping[str, Any], where: str) -> bool:
    """Whether a config.json says that weights are MXFP4. Raises NotSupportedError for a field that is not known."""
    found: Any = config.get(QUANTIZATION_CONFIG)
    if not isinstance(found, dict) or found.get("quant_method") != "mxfp4":  # pyright: ignore[reportUnknownMemberType]
        return False
    fields: dict[str, Any] = found  # pyright: ignore[reportUnknownVariableType]
    if strange := sorted(name for name, value in fields.items() if name not in _KNOWN and value is not None):
        told = ", ".join(f"{name} = {fields[name]!r}"[:100] for name in strange)
        raise NotSupportedError(
            f"{where}: {QUANTIZATION_CONFIG}: fields that are not understood and may change the weights: {told}"
        )
    return True


def packed_shape(name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape of X_blocks or X_scales where X is among `shapes`; None for any other name."""
    ending = next((e for e in (BLOCKS, SCALES) if name.endswith(e)), None)
    shape = shapes.get(name.removesuffix(ending)) if ending else None
    if shape is None or len(shape) != 3:
        return None
    experts, columns, height = shape
    return (experts, height, columns // GROUP, *((GROUP // 2,) if ending == BLOCKS else ()))


def without_mxfp4(folder: HfFolder, ignore: Iterable[str] = ()) -> HfFolder:
    """The folder as its weights are meant: X for each X_blocks with X_scales, no quantization_config. Nothing is read.

    A folder that is not MXFP4 is returned itself. Weights are read in the config's dtype, bf16 if it has none.
    Raises BadInputError, naming both tensors, for blocks without scales, scales without blocks and shapes that do
    not belong together.
    """
    where = str(folder.path / "config.json")
    if QUANTIZATION_CONFIG in ignore or not is_mxfp4(folder.config, where):
        return folder
    dtype = dtype_of(folder.config, where)
    made: dict[str, LazyTensor] = {}
    count = 0
    for name, tensor in folder.tensors.items():
        if name.endswith(BLOCKS):
            whole = name.removesuffix(BLOCKS)
            made[whole] = _dequantised(folder, whole, dtype)
            count += 1
        elif not name.endswith(SCALES):
            made[name] = tensor
        elif (blocks := name.removesuffix(SCALES) + BLOCKS) not in folder.tensors:
            raise BadInputError(f"{_place(folder, name)} has no weight: expected {blocks!r} beside it")
    if not count:
        raise BadInputError(
            f"{where}: {QUANTIZATION_CONFIG} says mxfp4, but {folder.path} holds no tensor that ends in {BLOCKS}; if "
            f"the weights were dequantised, remove {QUANTIZATION_CONFIG}"
        )
    note = (
        f"{count} tensors are MXFP4 with a scale for {GROUP} numbers: they are read as "
        f"{str(dtype).removeprefix('torch.')}, and {QUANTIZATION_CONFIG} is not carried over"
    )
    config = without_quantisation(folder.config)
    return replace(folder, config=config, tensors=made, notes=(*folder.notes, note))


def _dequantised(folder: HfFolder, name: str, dtype: torch.dtype) -> LazyTensor:
    blocks, scales = folder.tensors[name + BLOCKS], folder.tensors.get(name + SCALES)
    place = _place(folder, name + BLOCKS)
    if scales is None:
        raise BadInputError(f"{place} has no scales: expected {name + SCALES!r} beside it")
    if name in folder.tensors:
        raise BadInputError(f"{place}: {name!r} stands beside it, so the weight is there twice; remove one of them")
    for kind, tensor in ((BLOCKS, blocks), (SCALES, scales)):
        if tensor.dtype != torch.uint8:
            raise BadInputError(f"{_place(folder, name + kind)}: expected bytes (uint8), found {tensor.dtype}")
    if (
        len(blocks.shape) != 4
        or not blocks.shape[0]
        or blocks.shape[3] != GROUP // 2
        or scales.shape != blocks.shape[:3]
    ):
        raise BadInputError(
            f"{place}: expected shape [experts, rows, groups, {GROUP // 2}], found {list(blocks.shape)}, and for "
            f"{name + SCALES!r} the same without its last size, found {list(scales.shape)}"
        )
    experts, height, groups, half = blocks.shape
    flat = Mxfp4(
        reshaped(blocks, (experts * height, groups * half)),
        reshaped(scales, (experts * height, groups)),
        dtype,
        where=_place(folder, name + SCALES),
    )
    parts = [turned(rows(flat, expert * height, (expert + 1) * height)) for expert in range(experts)]
    return reshaped(join_rows(parts), (experts, groups * GROUP, height))


def _place(folder: HfFolder, name: str) -> str:
    tensor = folder.tensors[name]
    return f"{tensor.path if isinstance(tensor, Stored) else folder.path}: tensor {name!r}"
