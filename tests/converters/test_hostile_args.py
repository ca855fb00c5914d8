"""A Megatron checkpoint whose arguments were tampered with: refused in words, whatever stands in them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptbridge.converters.convert import plan_conversion
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.mcore.args import BEYOND, TOLD_BY_ARGUMENTS
from ckptbridge.converters.model import open_model
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.rope_scaling import LinearRopeScaling, Llama3RopeScaling, LongRopeScaling, YarnRopeScaling
from tests.conftest import TinyFolders
from tests.converters.test_families import parse

NO_NUMBERS: tuple[Any, ...] = ("wide", [], [[1.0]], {"a": 1}, True, float("nan"), float("inf"), 10**30, torch.ones(3))
HOSTILE: tuple[Any, ...] = (*NO_NUMBERS, None, -1, 0, 1, 1.5, False, [1], [[1]] * 4, ["x"] * 4, {}, torch.float32, 1j)
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 16},
    "longrope": {
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 16,
        "attention_factor": 1.0,
    },
}
Tampered = Callable[[str, dict[str, Any]], Path]


@pytest.fixture(scope="module")
def tampered(tiny_folder: TinyFolders, tmp_path_factory: pytest.TempPathFactory) -> Tampered:
    """`tampered(name, changes)` is TINY[name] as a Megatron checkpoint without config.json, its args changed."""
    made: dict[str, tuple[Path, dict[str, Any]]] = {}

    def folder(name: str, changes: dict[str, Any]) -> Path:
        if name not in made:
            target = tmp_path_factory.mktemp("hostile") / name
            execute(plan_conversion(open_model(tiny_folder(name)), target, "torch_dist"))
            (target / "hf" / "config.json").unlink()
            made[name] = target, torch.load(target / "release" / "common.pt", weights_only=False)  # made right here
        target, state = made[name]
        args = vars(state["args"])
        if BEYOND in changes and isinstance(changes[BEYOND], dict):
            changes = changes | {BEYOND: args.get(BEYOND, {}) | changes[BEYOND]}
        torch.save(state | {"args": Namespace(**deepcopy(args) | changes)}, target / "release" / "common.pt")
        return target

    return folder


def assert_refused(folder: Path, *words: str) -> None:
    with pytest.raises(BadInputError) as refused:
        open_model(folder)
    for word in (str(folder), *words):
        assert word in str(refused.value)


def test_only_what_has_no_argument_is_taken_from_what_was_kept(tampered: Tampered) -> None:
    """Otherwise a name would stand twice: as the argument says it, and as the dict does."""
    assert {"num_layers", "moe_layer_freq", "rotary_base"} <= TOLD_BY_ARGUMENTS
    for name in [*sorted(TOLD_BY_ARGUMENTS), "strange"]:
        for value in (4, "wide", None):
            assert_refused(tampered("llama", {BEYOND: {name: value}}), BEYOND, name)


@pytest.mark.parametrize("model", ["llama", "phi3_long", "qwen3_moe_dense_first"])
def test_no_value_of_any_field_or_argument_ends_in_a_traceback(model: str, tampered: Tampered) -> None:
    """Opening and planning, and never another error than one that says what is wrong."""
    args = torch.load(tampered(model, {}) / "release" / "common.pt", weights_only=False)["args"]
    cases: list[dict[str, Any]] = [{BEYOND: value} for value in HOSTILE]
    turn = cycle(HOSTILE)  # of a length that no other count divides: over three models each value meets most names
    for name in vars(args).keys() - {BEYOND}:
        cases += [{name: next(turn)}, {name: next(turn), BEYOND: None}]
    for name in {field.name for field in fields(ModelConfig)} - TOLD_BY_ARGUMENTS:
        cases += [{BEYOND: {name: next(turn)}} for _ in range(4)]
    refused = 0
    for case in cases:
        folder = tampered(model, case)
        try:
            plan_conversion(open_model(folder), folder.with_name("target"), "hf")
        except BadInputError:
            refused += 1
    assert refused > len(cases) // 4


@pytest.mark.parametrize("kind", ROPES)
def test_a_number_of_rope_scaling_that_is_none_is_refused_by_name(kind: str, tampered: Tampered) -> None:
    good = {"kind": kind, **ROPES[kind]}
    assert open_model(tampered("llama", {BEYOND: {"rope_scaling": good}})).config.rope_scaling is not None
    for name, value in ROPES[kind].items():
        spoiled = (*NO_NUMBERS, 0, -2)
        if isinstance(value, list):
            spoiled = (*spoiled, 2.0, *([1.0, 1.0, 1.0, one] for one in spoiled))
        for one in spoiled:
            assert_refused(tampered("llama", {BEYOND: {"rope_scaling": good | {name: one}}}), "rope_scaling", name)
    assert_refused(tampered("llama", {BEYOND: {"rope_scaling": good | {"strange": 1}}}), "strange")
    assert_refused(tampered("llama", {BEYOND: {"rope_scaling": good | {"kind": "round"}}}), "rope_scaling")


@pytest.mark.parametrize("kind", ROPES)
def test_the_same_numbers_are_refused_in_config_json(kind: str) -> None:
    hf: dict[str, Any] = {"architectures": ["Phi3ForCausalLM" if kind == "longrope" else "LlamaForCausalLM"]}
    hf |= {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 96}
    hf |= {"vocab_size": 250, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "max_position_embeddings": 128}
    parse(hf | {"rope_scaling": {"rope_type": kind, **ROPES[kind]}})
    for name in ROPES[kind]:
        for value in (*NO_NUMBERS[:-1], -2):
            with pytest.raises(BadInputError, match=name):
                parse(hf | {"rope_scaling": {"rope_type": kind, **ROPES[kind], name: value}})


@pytest.mark.parametrize("value", [(1, 0, 1, 2), (1, 0, 1, True), (1, 0, 1, "0"), (1, 0, 1, 0.0), (1, 0, 1, (0,))])
@pytest.mark.parametrize("name", ["window_layers", "moe_layer_freq"])
def test_layers_are_told_by_ones_and_zeros(name: str, value: tuple[Any, ...]) -> None:
    sizes: dict[str, Any] = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 8}
    sizes |= {"num_query_groups": 4, "kv_channels": 8, "vocab_size": 250}
    assert getattr(ModelConfig(**sizes | {name: (1, 0, 1, 0)}), name) == (1, 0, 1, 0)
    with pytest.raises(BadInputError, match=name):
        ModelConfig(**sizes | {name: value})


def test_numbers_of_every_scaling_are_checked_where_it_is_made() -> None:
    yarn: dict[str, Any] = {"factor": 2.0, "original_max_position_embeddings": 16}
    for name in ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"):
        with pytest.raises(BadInputError, match=name):
            YarnRopeScaling(**yarn | {name: "much"})
    assert YarnRopeScaling(**yarn | {"mscale": 1.0, "mscale_all_dim": 0.0}).mscale_all_dim == 0.0
    for made in (
        lambda: YarnRopeScaling(**yarn | {"beta_fast": 0.0}),
        lambda: YarnRopeScaling(**yarn | {"original_max_position_embeddings": 16.0}),
        lambda: Llama3RopeScaling(factor=8.0, low_freq_factor=0.0),
        lambda: LinearRopeScaling(factor=-2.0),
        lambda: LongRopeScaling(short_factor=(1.0,), long_factor=(0.0,), original_max_position_embeddings=16),
    ):
        with pytest.raises(BadInputError, match="rope_scaling"):
            made()
