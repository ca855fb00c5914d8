"""The report of a mixture that is written in another dtype than its source's: of what is written, and of the way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ckptbridge.converters.model import Model, open_model
from ckptbridge.converters.upcycling.construction import upcycled
from ckptbridge.converters.upcycling.spec import UpcycleSpec
from ckptbridge.trainer.upcycling.report import UpcycleReport, report
from ckptbridge.trainer.upcycling.report_lines import lines
from ckptbridge.trainer.upcycling.rounding import as_written
from tests.conftest import TinyFolders
from tests.tiny import save_tiny
from tests.trainer.test_upcycling_report import EXACT, IDS, Plant, reported, scaled_expert


def written(dense: Model, dtype: torch.dtype, plant: Plant = lambda moe: {}, **values: Any) -> UpcycleReport:
    """The report of a mixture as a conversion to `dtype` writes it."""
    spec = UpcycleSpec(**{"num_experts": 4, "seed": 3, **values})
    moe = upcycled(dense, spec)
    return report(dense, as_written(replace(moe, tensors={**moe.tensors, **plant(moe)}), dtype), spec, IDS)


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize(("dtype", "word"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")], ids=str)
def test_what_is_written_in_a_narrower_dtype_is_what_is_compared(
    dtype: torch.dtype, word: str, kind: str, tiny_folder: TinyFolders
) -> None:
    found = written(open_model(tiny_folder("qwen2")), dtype, **EXACT[kind])
    assert found.passed
    assert found.is_exact
    assert found.rounded_to == word
    assert found.logits[0].max_relative_difference > 1e-4  # of the source as it is
    assert found.rounded is not None
    assert found.rounded.max_relative_difference < 1e-5
    assert all(layer.output_difference < 1e-5 for layer in found.layers)
    assert any(f"rounded to {word}" in condition for condition in found.conditions)
    told = lines(found)
    assert f"is exact for the source rounded to {word}" in told[0]
    assert f"{found.logits[0].max_relative_difference:.1e}: that is the rounding to {word}" in told[1]
    assert "loss_difference" in found.to_json()["rounded"]


def test_a_mixture_of_a_mixture_may_be_rounded_too(tiny_folder: TinyFolders) -> None:
    found = written(
        open_model(tiny_folder("mixtral")), torch.bfloat16, num_experts=8, method="expert-upcycling", seed=0
    )
    assert found.passed  # though rounded routers send some tokens to other experts
    assert found.logits[0].max_relative_difference > 1e-3


def test_rounding_hides_no_fault(tiny_folder: TinyFolders) -> None:
    found = written(open_model(tiny_folder("llama")), torch.bfloat16, scaled_expert, granularity=2)
    assert not found.passed
    assert found.first_defect == 2
    assert lines(found)[0].startswith("DEFECT: virtual-group should be exact for the source rounded to bf16, but")


def test_rounding_is_a_reason_where_nothing_is_exact(tiny_folder: TinyFolders) -> None:
    dense = open_model(tiny_folder("llama"))
    found = written(dense, torch.bfloat16, method="drop")
    assert found.passed
    assert found.rounded is None
    assert "the weights are rounded to bf16" in found.inexact
    assert found.logits[0].loss_source == reported(dense).logits[0].loss_source


def test_a_wider_dtype_rounds_nothing_anew(tmp_path: Any) -> None:
    half = open_model(save_tiny("llama", tmp_path / "half", torch.bfloat16))
    copies = written(half, torch.float32)
    assert (copies.rounded_to, copies.tolerance, copies.passed) == (None, 1e-5, True)
    third = written(half, torch.float32, num_experts=6, topk=3, granularity=3)  # multiplied in bf16, then widened
    assert (third.rounded_to, third.tolerance, third.passed) == (None, 1e-2, True)
    assert third.logits[0].max_relative_difference > 1e-5


def test_copies_of_an_expert_stay_one_tensor_when_they_are_cast(tiny_folder: TinyFolders) -> None:
    moe = upcycled(open_model(tiny_folder("llama")), UpcycleSpec(num_experts=4, router="sigmoid", to="glm4_moe"))
    cast = as_written(moe, torch.bfloat16)
    stem = "decoder.layers.0.mlp.experts.experts."
    assert cast.tensors[f"{stem}0.linear_fc1.weight"] is cast.tensors[f"{stem}3.linear_fc1.weight"]
    assert cast.tensors[f"{stem}0.linear_fc1.weight"].dtype == cast.dtype == torch.bfloat16
    assert cast.tensors["decoder.layers.0.mlp.router.expert_bias"].dtype == torch.float32
    assert as_written(moe, None) is moe
