"""Launch knobs of the grouped matrix products, and the ones that were measured to be fastest.

`grouped_configs.json` beside this file is written by benchmarks/tune.py. It lists, for each generation of GPUs, the
products that were timed and the winner of each. A product that is not in the list takes the knobs of the one that is
nearest in size; a GPU that is not in the list takes `DEFAULT`, or `SMALL` where that does not fit.
"""

# Shapes: E experts. A product has tiles of `block_rows` x `block_columns` and sums over `block_depth` at a time.

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

Kind = Literal["transposed", "plain", "gathered", "weight_gradient", "of_gathered_d", "of_gathered_x"]
"""rows x weight^T, rows x weight, gathered rows x weight^T; d^T x, the same with one of them gathered."""

TABLE = Path(__file__).with_name("grouped_configs.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedConfig:
    """How one product is cut up. `group` tiles of rows share the tiles of columns that are read in turn."""

    block_rows: int
    block_columns: int
    block_depth: int = 64
    num_warps: int = 8
    num_stages: int = 3
    group: int = 8
    parts: int = 1  # the tile is stored in 1, 2 or 4 parts, which share one buffer of shared memory
    descriptors: bool = True  # tiles come by the copy engine; else every thread loads its own elements
    descriptor_stores: bool = True  # and leave by it
    programs: int = 1  # on a multiprocessor; two small ones cover each other's stores
    flatten: bool = True  # the first loads of a tile are under way while the last tile is stored
    lead: int = 0  # steps that gluon's first half runs ahead of its second, so that they store at different times
    engine: Literal["triton", "gluon"] = "triton"  # gluon: warps with roles, on Hopper; else, or to gather, triton


DEFAULT = GroupedConfig(block_rows=128, block_columns=256, parts=2)
"""160 KiB of shared memory: what data centres' GPUs have from compute capability 8.0 on."""
SMALL = GroupedConfig(block_rows=128, block_columns=128, parts=4)
"""80 KiB: a GeForce's or an RTX PRO's 99 KiB."""
_LEAST_FOR_DEFAULT = 163_872
"""Bytes that Triton 3.6 and 3.9 ask for of a weight gradient with DEFAULT."""


class Product(NamedTuple):
    """What a table entry is looked up by: the output's columns (and a weight gradient's rows), the depth of the sum."""

    kind: Kind
    E: int
    rows: int  # of a whole buffer for products with rows, of one expert's matrix for a weight gradient
    columns: int
    depth: int


def config_for(product: Product, device: torch.device) -> GroupedConfig:
    """The knobs measured for `product` or for the nearest one of its kind."""
    if device.type != "cuda":
        return DEFAULT
    properties = torch.cuda.get_device_properties(device)
    return _nearest(product, f"{properties.major}.{properties.minor}", properties.shared_memory_per_block_optin)


@functools.cache
def _nearest(product: Product, capability: str, shared_memory: int) -> GroupedConfig:
    known = [
        (Product(**entry["product"]), GroupedConfig(**entry["config"]))
        for entry in _table().get(capability, [])
        if entry["product"]["kind"] == product.kind
    ]
    if not known:
        return DEFAULT if shared_memory >= _LEAST_FOR_DEFAULT else SMALL
    return min(known, key=lambda entry: _distance(entry[0], product))[1]


@functools.cache
def _table() -> dict[str, list[dict]]:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def _distance(one: Product, other: Product) -> float:
    """How many doublings lie between two products, over all sizes."""
    sizes = zip(one[1:], other[1:], strict=True)
    return sum(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in sizes)
