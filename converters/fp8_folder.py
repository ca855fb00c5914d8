"""A Hugging Face folder whose weights are fp8 in blocks, as the folder that it would be without: DeepSeek-V3's form.

`X.weight` is float8_e4m3fn, `X.weight_scale_inv` beside it holds its scales, and config.json has
`quantization_config: {quant_method: fp8, weight_block_size: [128, 128], ...}`. A stack of experts [E, R, C] has a
stack of scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch

from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.fp8_blocks import BlockScaled, BlockSize
from ckptbridge.converters.hf_folder import HfFolder
from ckptbridge.converters.tensors import LazyTensor, Stored, reshaped

SCALE_SUFFIX = "_scale_inv"
QUANTIZATION_CONFIG = "quantization_config"

_OUTPUT_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _is_block_size(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    sizes: list[Any] = value  # pyright: ignore[reportUnknownVariableType]
    return len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes)


_RULES: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "quant_method": (None, lambda value: value == "fp8", "'fp8'"),
    "weight_block_size": (None, _is_block_size, "two sizes as in [128, 128], one scale for each block"),
    "fmt": ("e4m3", lambda value: value in ("e4m3", "float8_e4m3fn"), "'e4m3'"),
    "activation_scheme": ("dynamic", lambda value: value == "dynamic", "'dynamic', which stores no activation scales"),
    "expert_dtype": ("fp8", lambda value: value == "fp8", "'fp8'"),
}
"""Each field of quantization_config that says how to read: what a missing one means, what can be read, in words."""
_TOLD_BY_THE_FILES = ("modules_to_not_convert", "ignored_layers", "modules_to_convert", "dequantize", "scale_fmt")
"""Which tensors are fp8 stands in the headers, and a scale that is a power of two is a number like others."""


def block_size_of(config: Mapping[str, Any], where: str) -> BlockSize | None:
    """What a config.json says of fp8 weights in blocks; None when it does not say that weights are quantised.

    Raises NotSupportedError naming the method or the field when they are quantised in another way.
    """
    found = config.get(QUANTIZATION_CONFIG)
    if found is None:
        return None
    if not isinstance(found, dict):
        raise BadInputError(f"{where}: {QUANTIZATION_CONFIG} is {found!r}, expected an object")
    fields: dict[str, Any] = {name: value for name, value in found.items() if value is not None}  # pyright: ignore
    size: list[int] = fields.get("weight_block_size", [])
    for name, (missing, can_be_read, words) in _RULES.items():
        value = fields.pop(name, missing)
        if not can_be_read(value):
            raise NotSupportedError(
                f"{where}: {QUANTIZATION_CONFIG}: {name} is {value!r}; expected {words}; take the model's bf16 files"
            )
    if strange := sorted(fields.keys() - set(_TOLD_BY_THE_FILES)):
        told = ", ".join(f"{name} = {fields[name]!r}"[:100] for name in strange)
        raise NotSupportedError(
            f"{where}: {QUANTIZATION_CONFIG}: fields that are not understood and may change the weights: {told}"
        )
    rows, columns = size
    return BlockSize(rows, columns)


def dequantised(folder: HfFolder, ignore: Iterable[str] = ()) -> HfFolder:
    """The folder as its weights are meant: no fp8, no scales, no quantization_config. Nothing is read.

    A folder that is not quantised is returned itself. Weights are read in the config's dtype, bf16 if it has none.
    Raises BadInputError, naming file and tensor, for a weight without scales, scales without their weight and
    scales of a wrong shape; NotSupportedError for another way of quantising.
    """
    where = str(folder.path / "config.json")
    size = None if QUANTIZATION_CONFIG in ignore else block_size_of(folder.config, where)
    if size is None:
        return _without_fp8(folder)
    dtype = dtype_of(folder.config, where)
    made: dict[str, LazyTensor] = {}
    count = 0
    for name, tensor in folder.tensors.items():
        if name.endswith(SCALE_SUFFIX):
            _check_weight_of(name, folder)
        elif is_fp8(tensor):
            made[name] = _dequantised(name, folder, size, dtype)
            count += 1
        else:
            made[name] = tensor
    if not count:
        raise BadInputError(
            f"{where}: {QUANTIZATION_CONFIG} says fp8, but no tensor of {folder.path} is float8_e4m3fn; if the weights "
            f"were dequantised, remove {QUANTIZATION_CONFIG}"
        )
    note = (
        f"{count} weights are float8_e4m3fn with a scale for each {size.rows} x {size.columns} block: they are read as "
        f"{_word(dtype)}, and {QUANTIZATION_CONFIG} is not carried over"
    )
    return replace(folder, config=without_quantisation(folder.config), tensors=made, notes=(*folder.notes, note))


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the weights that fp8 ones stand for."""
    return {name: value for name, value in config.items() if name != QUANTIZATION_CONFIG}


def _without_fp8(folder: HfFolder) -> HfFolder:
    for name, tensor in folder.tensors.items():
        if is_fp8(tensor):
            raise NotSupportedError(
                f"{_place(folder, name)} is {_word(tensor.dtype)}, but config.json has no {QUANTIZATION_CONFIG}, which "
                "says what its values stand for: add the one that it was published with, or take the bf16 files"
            )
    return folder


def is_fp8(tensor: LazyTensor) -> bool:
    """Whether a tensor's elements are floating point numbers of one byte."""
    return tensor.dtype.itemsize == 1 and tensor.dtype.is_floating_point


def dtype_of(config: Mapping[str, Any], where: str) -> torch.dtype:
    """The dtype in which quantised weights are read. Raises NotSupportedError for one that cannot be."""
    name = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    if not isinstance(name, str) or name not in _OUTPUT_DTYPES:
        raise NotSupportedError(
            f"{where}: dtype is {name!r}; quantised weights are read as {', '.join(_OUTPUT_DTYPES)}"
        )
    return _OUTPUT_DTYPES[name]


def _check_weight_of(scales: str, folder: HfFolder) -> None:
    weight = scales.removesuffix(SCALE_SUFFIX)
    found = folder.tensors.get(weight)
    if found is None:
        raise BadInputError(
            f"{_place(folder, scales)} has no weight: expected {weight!r} of float8_e4m3fn beside it; the folder is "
            "incomplete or mixes two models"
        )
    if not is_fp8(found):
        raise BadInputError(
            f"{_place(folder, weight)}: expected float8_e4m3fn, since {scales!r} holds its scales, found "
            f"{_word(found.dtype)}; if the weight was dequantised, remove the scales"
        )


def _dequantised(name: str, folder: HfFolder, size: BlockSize, dtype: torch.dtype) -> LazyTensor:
    codes, place = folder.tensors[name], _place(folder, name)
    scales = folder.tensors.get(name + SCALE_SUFFIX)
    if codes.dtype != torch.float8_e4m3fn:
        raise NotSupportedError(f"{place}: expected float8_e4m3fn, found {_word(codes.dtype)}; take the bf16 files")
    if scales is None:
        raise BadInputError(
            f"{place} is float8_e4m3fn without its scales: expected {name + SCALE_SUFFIX!r} beside it; copy or "
            "download the folder again"
        )
    if len(codes.shape) not in (2, 3):
        raise NotSupportedError(f"{place}: expected a matrix or a stack of them, found shape {list(codes.shape)}")
    place, grid = _place(folder, name + SCALE_SUFFIX), size.grid(codes.shape)
    if scales.shape != grid:
        raise BadInputError(
            f"{place}: expected shape {list(grid)}, a scale for each {size.rows} x {size.columns} block of "
            f"{list(codes.shape)}, found {list(scales.shape)}"
        )
    if scales.dtype not in _SCALE_DTYPES:
        known = " or ".join(map(_word, _SCALE_DTYPES))
        raise NotSupportedError(f"{place}: expected scales of {known}, found {_word(scales.dtype)}")
    flat_codes = reshaped(codes, (prod(codes.shape[:-1]), codes.shape[-1]))
    flat_scales = reshaped(scales, (prod(grid[:-1]), grid[-1]))
    flat = BlockScaled(flat_codes, flat_scales, size, dtype, where=place, height=codes.shape[-2])
    return reshaped(flat, codes.shape)


def _place(folder: HfFolder, name: str) -> str:
    tensor = folder.tensors[name]
    return f"{tensor.path if isinstance(tensor, Stored) else folder.path}: tensor {name!r}"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
