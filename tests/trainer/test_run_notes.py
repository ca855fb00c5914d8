"""What a run says of itself before it has cost anything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptbridge.converters.model import open_model
from ckptbridge.trainer.recipe import KernelsSection, Recipe
from ckptbridge.trainer.recipe_file import load_recipe, parse_recipe, with_overrides
from ckptbridge.trainer.run_notes import kernels_of_plan, notes_of
from ckptbridge.trainer.tokens import Tokens
from tests.conftest import TinyFolders

SMALL: dict[str, Any] = {
    "run_folder": "runs/x",
    "model": {"init_from": "somewhere"},
    "data": {"text": ["*.py"], "sequence_length": 128},
    "schedule": {"total_steps": 3},
}


def recipe(*overrides: str) -> Recipe:
    return parse_recipe(with_overrides(SMALL, overrides))


def test_positions_beyond_the_models_own_are_told(tiny_folder: TinyFolders) -> None:
    config = open_model(tiny_folder("llama")).config
    assert config.max_position_embeddings == 128
    assert notes_of(recipe(), config) == []
    (note,) = notes_of(recipe("data.sequence_length=129"), config)
    assert note.startswith("data.sequence_length 129 is beyond the model's max_position_embeddings 128")
    assert "config.json goes on to say 128" in note
    assert notes_of(recipe("data.sequence_length=129"), replace(config, max_position_embeddings=129)) == []


def test_settings_of_mixtures_are_told_of_a_dense_model(tiny_folder: TinyFolders) -> None:
    mixture, dense = (open_model(tiny_folder(name)).config for name in ("mixtral", "llama"))
    asked = recipe("moe.capacity_factor=1.5", "moe.drop_policy=position", "moe.aux_loss_coeff=0")
    (note,) = notes_of(asked, dense)
    assert note == "moe.capacity_factor, moe.drop_policy: without effect, for the model has no experts."
    assert not any("without effect" in told for told in notes_of(asked, mixture))


@pytest.mark.parametrize("name", ["glm4_moe", "deepseek_v3"])
def test_a_mixture_that_nothing_balances_is_told(name: str, tiny_folder: TinyFolders) -> None:
    config = replace(open_model(tiny_folder(name)).config, moe_aux_loss_coeff=0.0)
    assert config.moe_router_enable_expert_bias
    (note,) = notes_of(recipe(), config)
    assert note.startswith(
        "Nothing balances the experts: the model's config has no load-balancing loss, and moe.bias_update_rate is 0"
    )
    assert "set moe.aux_loss_coeff, or moe.bias_update_rate, such as to 0.001" in note
    for balanced in ("moe.aux_loss_coeff=1e-3", "moe.bias_update_rate=1e-3"):
        assert notes_of(recipe(balanced), config) == []


def test_only_a_mixture_without_the_loss_is(tiny_folder: TinyFolders) -> None:
    mixture, dense = (open_model(tiny_folder(name)).config for name in ("mixtral", "llama"))
    assert mixture.moe_aux_loss_coeff > 0
    assert notes_of(recipe(), mixture) == notes_of(recipe("moe.aux_loss_coeff=0"), dense) == []
    (note,) = notes_of(recipe("moe.aux_loss_coeff=0.0"), mixture)
    assert note.startswith("Nothing balances the experts: moe.aux_loss_coeff is 0. Tokens")


def test_files_that_were_passed_over_are_told(tiny_folder: TinyFolders) -> None:
    config, nothing = open_model(tiny_folder("llama")).config, np.empty(0, np.uint16)
    for note in (None, "2 of 3 files"):
        tokens = Tokens(train=nothing, held_out=nothing, digest="", note=note)
        assert notes_of(recipe(), config, tokens) == ([] if note is None else [note])


def test_a_plan_says_for_which_kernels_it_holds() -> None:
    ours = "The figures are those of the Triton kernels (kernels.backend auto on a GPU, or triton)"
    assert kernels_of_plan(KernelsSection()) == kernels_of_plan(KernelsSection(backend="triton")) == f"{ours}."
    for backend in ("reference", "torch", "transformer_engine"):
        assert kernels_of_plan(KernelsSection(backend=backend)).startswith(f"{ours}. This recipe asks for {backend}, ")
    assert kernels_of_plan(KernelsSection(attention="math")) == (
        f"{ours} and of attention that keeps no scores. This recipe asks for math, which keeps them."
    )


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "recipes").glob("train_*.yaml")))
def test_shipped_recipes_say_nothing_of_balance(path: Path, tiny_folder: TinyFolders) -> None:
    config = replace(open_model(tiny_folder("mixtral")).config, max_position_embeddings=1 << 20)
    assert notes_of(load_recipe(path), config) == []
