"""The parameters of a model in an opened Megatron checkpoint: every key used, none missing, or refused."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.fold import folded
from ckptbridge.converters.mapping import Family
from ckptbridge.converters.mcore.keys import Address, address_of
from ckptbridge.converters.mcore.optimizer.cells import from_grid, is_grid
from ckptbridge.converters.mcore.optimizer.untrained import has_optimizer_state
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.tensors import LazyTensor, rows

if TYPE_CHECKING:
    from ckptbridge.converters.mcore.torch_dist_reader import TorchDistFolder

_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")
_STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.([^.]+)\.(.+)")
_MAIN_WEIGHT = ("param", "fp32_param")
"""What the distributed optimizer's fully_reshardable form calls its fp32 weights, and what every other form does."""


def is_optimizer_key(key: str) -> bool:
    """Whether a key belongs to an optimizer, or to one of several chained ones."""
    return _OPTIMIZER.match(key) is not None


def keys_of_state(keys: Iterable[str], state: str) -> dict[str, str]:
    """{key of the weight: key of its `state`}; of several chained optimizers, some of which put a prefix first."""
    if not state:
        return {key: key for key in keys if not is_optimizer_key(key)}
    wanted = _MAIN_WEIGHT if state == "param" else (state,)
    return {hit[2]: key for key in keys if (hit := _STATE.fullmatch(key)) and hit[1] in wanted}


def parameters_of(
    folder: TorchDistFolder, family: Family, config: ModelConfig, state: str = ""
) -> dict[str, LazyTensor]:
    """One state of every parameter by name, one a layer and expert; the vocabulary without its padding.

    Of the optimizer's states, those of parameters that Megatron trains; what a file holds of others is passed over.
    Raises BadInputError that lists every missing and unexpected key and every shape that the config contradicts.
    """
    stored = keys_of_state(folder.tensors, state)
    if state == "param":
        stored = _own_main_weights(folder) | stored
    keys = set(stored)
    per_layer = any(key.startswith("decoder.layers.0.") for key in keys)
    used: set[str] = set()
    missing: list[str] = []
    wrong: set[str] = set()
    tensors: dict[str, LazyTensor] = {}
    for move in family.moves(config):
        address = _spelled(address_of(move.name, config, per_layer_keys=per_layer), keys)
        if state and not has_optimizer_state(move.name):
            used.add(address.key)
            continue
        if address.key not in keys:
            missing.append(move.name)
            continue
        used.add(address.key)
        whole = folder.tensors[stored[address.key]]
        if state and is_grid(whole, address.axes, move.shape):
            most_padding = padding_multiple(folder.args) if move.layout.is_vocab else 1
            tensors[move.name] = from_grid(whole, address.index, move.shape, most_padding)
            continue
        expected = (*address.axes, *move.shape)
        extra_rows = whole.shape[0] - move.shape[0] if whole.shape[1:] == move.shape[1:] else -1
        padded = move.layout.is_vocab and 0 <= extra_rows < padding_multiple(folder.args)
        if whole.shape != expected and not padded:
            found = f"expected shape {list(expected)} from the config, found {list(whole.shape)}"
            wrong.add(f"  {stored[address.key]}: {found}")
            continue
        part = whole.part(address.index)
        tensors[move.name] = rows(part, 0, move.shape[0]) if padded else part
    unexpected = sorted(keys - used)
    if missing or unexpected or wrong:
        lines = [f"{folder.path}: the tensors do not fit the config, so nothing was written"]
        lines += [f"  {len(missing)} missing: {', '.join(folded(missing)[:12])}"] if missing else []
        lines += [f"  {len(unexpected)} unexpected: {', '.join(folded(unexpected)[:12])}"] if unexpected else []
        raise BadInputError("\n".join([*lines, *sorted(wrong)[:12]]))
    return tensors


def _own_main_weights(folder: TorchDistFolder) -> dict[str, str]:
    """Weights in fp32: the mixed-precision optimizer keeps no second copy of them."""
    weights = keys_of_state(folder.tensors, "")
    return {key: stored for key, stored in weights.items() if folder.tensors[stored].dtype == torch.float32}


def padding_multiple(args: Namespace | None) -> int:
    """Megatron pads the vocabulary to a multiple of this; without args, of the largest that is in use."""
    multiple, tp = (
        getattr(args, "make_vocab_size_divisible_by", None),
        getattr(args, "tensor_model_parallel_size", None),
    )
    return multiple * tp if isinstance(multiple, int) and isinstance(tp, int) else 128 * 64


_LOCAL_SPELLING = (".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
"""Megatron's local (non-TE) layer spec saves the norm before a mixture under the dense layer's name."""


def _spelled(address: Address, keys: set[str]) -> Address:
    if address.key in keys or _LOCAL_SPELLING[0] not in address.key:
        return address
    return Address(address.key.replace(*_LOCAL_SPELLING), address.index, address.axes)
