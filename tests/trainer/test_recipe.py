"""Recipes: what is refused, in which words, and that a saved recipe is the same recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ckptbridge.converters.errors import BadInputError
from ckptbridge.trainer.recipe import Recipe, json_schema
from ckptbridge.trainer.recipe_file import load_recipe, parse_recipe, read_values, save_recipe, with_overrides

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL: dict[str, Any] = {
    "run_folder": "runs/x",
    "model": {"init_from": "somewhere"},
    "data": {"text": ["*.py"]},
    "schedule": {"total_steps": 3},
}


def refusal(*overrides: str) -> str:
    with pytest.raises(BadInputError) as caught:
        parse_recipe(with_overrides(SMALL, overrides))
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimiser.lr=1", "unknown key optimiser, did you mean optimizer?"),
        ("data.sequence_lenght=8", "unknown key data.sequence_lenght, did you mean data.sequence_length?"),
        ("total_steps=8", "unknown key total_steps, did you mean schedule.total_steps?"),
        ("optimizer.nonsense=8", "unknown key optimizer.nonsense; known are lr, betas, eps, weight_decay, clip_grad"),
        ("data.seed=1.5", "data.seed: input should be a valid integer, found 1.5"),
        ("data.seed='1'", "data.seed: input should be a valid integer, found '1'"),
        ("export.hf=1", "export.hf: input should be a valid boolean, found 1"),
        ("optimizer.lr=-1", "optimizer.lr: input should be greater than 0, found -1"),
        ("optimizer.lr=.inf", "optimizer.lr: input should be a finite number, found inf"),
        ("device=gpu", "device: input should be 'auto', 'cpu' or 'cuda', found 'gpu'"),
        ("data.text=[]", "data.text: list should have at least 1 item"),
        ("data.micro_batch_size=3", "global_batch_size 8 is not a multiple of micro_batch_size 3"),
        ("schedule.warmup_steps=3", "warmup_steps 3 must be below total_steps 3"),
        ("schedule.min_lr=1", "schedule.min_lr 1.0 is above optimizer.lr 3e-05"),
        ("seed=99999999999999999999999", "seed: input should be less than or equal to 9223372036854775807, found 9999"),
        ("data.seed=9223372036854775808", "data.seed: input should be less than or equal to 9223372036854775807"),
        ("data.document_separator=''", "data.document_separator: string should have at least 1 character, found ''"),
    ],
)
def test_refusals_name_key_and_value(override: str, said: str) -> None:
    assert said in refusal(override)


def test_yaml_reads_a_switch_as_a_boolean() -> None:
    for text, value in (("off", "off"), ("on", "on"), ("auto", "auto"), ("'off'", "off")):
        assert parse_recipe(with_overrides(SMALL, [f"kernels.graph={text}"])).kernels.graph == value
    assert "kernels.graph: input should be 'auto', 'on' or 'off', found 'maybe'" in refusal("kernels.graph=maybe")


def test_what_full_recompute_leaves_is_not_offloaded() -> None:
    assert "only layers' inputs" in refusal("memory.recompute=full", "memory.offload=activations")


def test_all_problems_are_told_at_once() -> None:
    assert len(refusal("optimiser.lr=1", "data.seed=-1", "precision=fp8").splitlines()) == 4


def test_missing_keys_are_named() -> None:
    with pytest.raises(BadInputError) as caught:
        parse_recipe({"data": {}})
    text = str(caught.value)
    assert all(f"{key} is missing" in text for key in ("run_folder", "model", "data.text", "schedule"))


@pytest.mark.parametrize(
    ("override", "value"),
    [("3e-5", 3e-5), ("1e3", 1000.0), ("0.5", 0.5), ("7", 7), ("null", None), ("[a, b]", ["a", "b"]), ("x=y", "x=y")],
)
def test_overrides_are_read_as_yaml(override: str, value: object) -> None:
    assert with_overrides({}, [f"a.b={override}"]) == {"a": {"b": value}}


@pytest.mark.parametrize("override", ["optimizer.lr", "=3", "a..b=3", "optimizer.lr=[1", "run_folder.x=3"])
def test_overrides_that_are_none_are_refused(override: str) -> None:
    with pytest.raises(BadInputError, match="--set"):
        with_overrides(SMALL, [override])


def test_a_section_that_is_null_is_one_that_was_left_out(tmp_path: Path) -> None:
    save_recipe(parse_recipe(SMALL), tmp_path / "recipe.yaml")
    assert "upcycle: null" in (tmp_path / "recipe.yaml").read_text()
    changed = load_recipe(tmp_path / "recipe.yaml", ["model.upcycle.num_experts=4", "model.upcycle.topk=1"])
    assert changed.model.upcycle is not None
    assert (changed.model.upcycle.num_experts, changed.model.upcycle.topk) == (4, 1)


def test_overrides_leave_the_values_alone() -> None:
    with_overrides(SMALL, ["data.seed=4"])
    assert "seed" not in SMALL["data"]


def test_a_saved_recipe_is_the_same_recipe(tmp_path: Path) -> None:
    recipe = parse_recipe(with_overrides(SMALL, ["optimizer.betas=[0.8, 0.9]", "moe.aux_loss_coeff=1e-3"]))
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize("text", ["- a", "a: [", "\x00"])
def test_files_that_are_no_recipe_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(BadInputError, match=r"recipe\.yaml"):
        load_recipe(path)
    with pytest.raises(BadInputError, match="no such recipe"):
        load_recipe(tmp_path / "other.yaml")


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("data:\n  text: [a]\nrun_folder: x\n\n# more\ndata:\n  seed: 3\n", "data", (1, 6)),
        ('data:\n  text: [a]\n  seed: 1\n  "text": [b]\n', "text", (2, 4)),
        ("model: {init_from: x, init_from: y}\n", "init_from", (1, 1)),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_both_lines(
    text: str, key: str, lines: tuple[int, int], tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(BadInputError) as caught:
        read_values(path)
    assert str(caught.value).startswith(f"{path}: key {key!r} stands on line {lines[0]} and again on line {lines[1]}")


def test_keys_of_two_sections_and_those_that_are_merged_in_may_be_alike(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("a: &a {seed: 1, lr: 2}\nb:\n  <<: *a\n  seed: 3\n")
    assert read_values(path) == {"a": {"seed": 1, "lr": 2}, "b": {"seed": 3, "lr": 2}}


@pytest.mark.parametrize("value", ["2001-13-45", "9" * 5000, "[" * 5000], ids=["date", "number", "depth"])
def test_values_that_yaml_cannot_build_are_no_defect_of_ours(value: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"seed: {value}\n")
    with pytest.raises(BadInputError, match=r"recipe\.yaml: not YAML"):
        read_values(path)
    with pytest.raises(BadInputError, match="--set"):
        with_overrides(SMALL, [f"seed={value}"])


def test_every_field_is_described() -> None:
    schema = json_schema()
    json.dumps(schema)
    for name, section in {"Recipe": schema, **schema["$defs"]}.items():
        for key, field in section["properties"].items():
            assert field.get("description") or "$ref" in field or "allOf" in field, f"{name}.{key}"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("train_*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_are_valid(path: Path) -> None:
    assert isinstance(load_recipe(path), Recipe)
