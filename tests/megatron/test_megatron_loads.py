"""The real megatron-core loads what we convert, under every layout, and computes what transformers computes."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
import torch

from tests.megatron.cases import DROPPED, FAULTS, LOADS, RENAMED, RENAMED_TO, VARIANTS
from tests.megatron.conftest import Cases, Report
from tests.megatron.launch import Layout, Result
from tests.tiny import TINY

pytestmark = [pytest.mark.mcore, pytest.mark.xdist_group("megatron")]

# fp32, logits up to 3: megatron-core differs from transformers by at most 3.2e-6, a fault by at least 1.9e-3.
TOLERANCE = 1e-5
FAULT = 1e-3


def check(result: Result, report: Report) -> None:
    """Nothing absent, nothing unread but extra states, and the logits of transformers."""
    assert not result.error, result.error
    assert result.absent == []
    assert [key for key in result.unread if not key.endswith("._extra_state")] == []
    assert result.max_abs_diff is not None
    report("max_abs_diff", result.max_abs_diff)
    assert result.max_abs_diff <= TOLERANCE


@pytest.mark.parametrize(("model", "layout"), LOADS, ids=str)
def test_megatron_computes_what_transformers_does(
    megatron: Cases, record_property: Report, model: str, layout: Layout
) -> None:
    check(megatron["load", model, str(layout)].result, record_property)


@pytest.mark.parametrize("name", VARIANTS)
def test_megatron_computes_what_transformers_does_in_a_variant(
    megatron: Cases, record_property: Report, name: str
) -> None:
    check(megatron["variant", name].result, record_property)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_shows(megatron: Cases, record_property: Report, name: str) -> None:
    result = megatron["fault", name].result
    assert not result.error, result.error
    assert result.max_abs_diff is not None
    record_property("max_abs_diff", result.max_abs_diff)
    assert result.max_abs_diff > FAULT


def test_wrong_keys_show(megatron: Cases) -> None:
    result = megatron["mislabelled",].result
    assert not result.error, result.error
    assert result.absent == [RENAMED, DROPPED]
    assert RENAMED_TO in result.unread


@pytest.mark.parametrize("model", TINY)
def test_saved_arguments_describe_the_model(megatron: Cases, model: str) -> None:
    case = megatron["load", model, "tp1"].case
    args = torch.load(case.folder / "common.pt", weights_only=False)["args"]
    expected = _arguments(case.config["transformer"], case.config["gpt"])
    assert {name: _plain(args, name) for name in expected} == expected


def _arguments(transformer: dict[str, Any], gpt: dict[str, Any]) -> dict[str, Any]:
    """Megatron-LM's names for what it would be given on the command line."""
    args = dict(transformer)
    args["num_experts"] = args.pop("num_moe_experts", None)
    args["swiglu"] = args.pop("gated_linear_unit")
    args.pop("moe_router_load_balancing_type", None)  # how it is trained, not what it computes
    return args | {
        "rotary_base": gpt["rotary_base"],
        "use_rope_scaling": gpt.get("rope_scaling", False),
        "rope_scaling_factor": gpt.get("rope_scaling_factor", 8.0),
        "untie_embeddings_and_output_weights": not gpt["share_embeddings_and_output_weights"],
        "max_position_embeddings": gpt["max_sequence_length"],
        "position_embedding_type": gpt["position_embedding_type"],
        "group_query_attention": True,
    }


def _plain(args: Namespace, name: str) -> Any:
    value = getattr(args, name, "absent")
    return list(value) if isinstance(value, tuple) else value
