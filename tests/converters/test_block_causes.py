"""Faults that a tool could have made with fp8 scales: each is seen by the oracle, and `diff` names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ckptbridge.converters.diff import DiffReport, diff
from ckptbridge.converters.model import open_model
from tests.converters.fp8_models import Wide, held, meant, wide_pairs, write_folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Wide:
    return wide_pairs(tmp_path_factory)


def compared(a: Path, b: Path) -> DiffReport:
    return diff(open_model(a), open_model(b))


Fault = Callable[[Tensor, Tensor], Tensor]


def _codes_times(codes: Tensor, scales: Tensor) -> Tensor:
    return meant(codes, scales, (128, 128))


FAULTS: dict[str, tuple[Fault, str]] = {
    "skipped": (lambda codes, scales: codes.bfloat16(), "fp8 scales missing: {side} holds the bare codes"),
    "divided": (
        lambda codes, scales: _codes_times(codes, 1 / scales),
        "divided by the fp8 scales in {side}, not multiplied",
    ),
    "transposed": (
        lambda codes, scales: _codes_times(codes, scales.T),
        "fp8 scales transposed in {side}",
    ),
    "of the neighbouring block": (
        lambda codes, scales: _codes_times(codes, scales.roll(1, 1)),
        "fp8 scales of other blocks in {side}",
    ),
    "one block": (
        lambda codes, scales: _codes_times(codes, scales * torch.eye(*scales.shape).mul(0.5).add(1)),
        "2 of 4 blocks of 128 x 128 scaled by a factor of their own",
    ),
}
_SQUARE = "model.layers.1.self_attn.o_proj.weight"
_PACKED = {_SQUARE: "linear_proj", "model.layers.1.self_attn.q_proj.weight": "linear_qkv"}


@pytest.mark.parametrize("weight", _PACKED)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_and_named(fault: str, weight: str, wide: Wide, tmp_path: Path) -> None:
    """By the oracle, and by `diff` against the fp8 files, from either side."""
    fp8, bf16 = wide("llama")
    plant, cause = FAULTS[fault]
    stored, plain = held(fp8), held(bf16)
    broken = plain | {weight: plant(stored[weight], stored[f"{weight}_scale_inv"])}
    assert not torch.equal(broken[weight], meant(stored[weight], stored[f"{weight}_scale_inv"], (128, 128)))
    folder = write_folder(tmp_path / "broken", json.loads((bf16 / "config.json").read_text()), broken)
    for a, b, side in ((fp8, folder, "B"), (folder, fp8, "A")):
        (found,) = compared(a, b).differences
        assert _PACKED[weight] in found.name
        assert cause.format(side=side) in found.cause, found.cause


def test_without_the_fp8_files_bare_codes_and_blocks_are_told_still(wide: Wide, tmp_path: Path) -> None:
    fp8, bf16 = wide("llama")
    stored, plain = held(fp8), held(bf16)
    config = json.loads((bf16 / "config.json").read_text())
    for fault, cause in (
        ("skipped", "fp8 scales missing: B holds the bare codes"),
        ("transposed", "2 of 4 blocks of 128 x 128 scaled by a factor of their own"),
    ):
        wrong = FAULTS[fault][0](stored[_SQUARE], stored[f"{_SQUARE}_scale_inv"])
        folder = write_folder(tmp_path / fault, config, plain | {_SQUARE: wrong})
        (found,) = compared(bf16, folder).differences
        assert cause in found.cause
