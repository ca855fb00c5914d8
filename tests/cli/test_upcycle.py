"""`upcycle` as a user meets it: every recipe that is shipped, flags over recipes, reports, refusals, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ckptbridge.cli import app
from ckptbridge.converters.tensors import scaled
from ckptbridge.converters.upcycling.spec import UpcycleSpec
from ckptbridge.mixture_flags import MixtureFlags
from ckptbridge.trainer.upcycle_recipe import DistillSection, UpcycleSection
from ckptbridge.trainer.upcycling import prepared as room
from ckptbridge.trainer.upcycling.report import REPORT_FILE as REPORT
from ckptbridge.verbs.upcycle import section_of
from ckptbridge.verbs.upcycle_report import Reporter
from tests.tiny import reference_logits, save_tiny, token_ids
from tests.trainer.text import save_tokenizer, write_documents

RECIPES = Path(__file__).parents[2] / "recipes" / "upcycle"
MODELS = ("llama", "llama_tied", "qwen2", "mixtral", "qwen3")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models with a tokenizer each, further models like llama, a text and prompts."""
    place = tmp_path_factory.mktemp("upcycle")
    for name in MODELS:
        save_tokenizer(save_tiny(name, place / name))
    for number in (1, 2, 3):
        other = save_tiny("llama", place / f"llama{number}")
        weights = load_file(other / "model.safetensors")
        drawn = torch.Generator().manual_seed(number)
        noisy = {n: t + 0.01 * torch.randn(t.shape, generator=drawn) for n, t in weights.items()}
        save_file(noisy, other / "model.safetensors", metadata={"format": "pt"})
    texts = write_documents(place / "texts", count=8)
    (place / "text.txt").write_text("\n".join(path.read_text() for path in sorted(texts.iterdir())))
    entries = [
        {"positive": [f"{word} {word} and more"], "negative": ["nothing"]} for word in ("one", "two", "six", "ten")
    ]
    (place / "prompts.yaml").write_text(yaml.safe_dump(entries))
    return place


def run(*words: object, code: int = 0) -> Result:
    """`ckptbridge upcycle ...` in this process."""
    done = CliRunner().invoke(app, ["upcycle", *map(str, words)], env={"COLUMNS": "200"})
    assert done.exit_code == code, f"{done.output}\n{done.exception!r}"
    return done


def shown(done: Result) -> str:
    """Output in one line, however it was wrapped."""
    return " ".join(done.output.replace("│", " ").split())


def deviation(folder: Path, dense: Path) -> float:
    """max |difference| / max |logit|, both by transformers."""
    expected = reference_logits(dense, token_ids())
    return ((reference_logits(folder, token_ids()) - expected).abs().max() / expected.abs().max()).item()


# ---- every recipe ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shipped:
    """A recipe on a tiny model: flags in {} are folders of the fixture; whether the mixture is to be exact."""

    source: str
    is_exact: bool
    flags: tuple[str, ...] = ()
    architecture: str = "MixtralForCausalLM"


_TEXT = ("--calibrate", "{place}/text.txt")
_OTHERS = tuple(word for number in (1, 2, 3) for word in ("--with", f"{{place}}/llama{number}"))
SHIPPED: dict[str, Shipped] = {
    "copy": Shipped("llama", True),
    "virtual_group": Shipped("llama", True),
    "shared_expert": Shipped("qwen2", True, architecture="Qwen2MoeForCausalLM"),
    "chosen_layers": Shipped("qwen3", True, architecture="Qwen3MoeForCausalLM"),
    "permute": Shipped("llama_tied", True),
    "noise": Shipped("llama", False),
    "drop": Shipped("llama", False),
    "split": Shipped("llama", False, _TEXT),
    # Of 96 neurons 24 are shared; transformers' grouped product wants rows of a multiple of 16 bytes.
    "cmoe": Shipped("qwen2", False, (*_TEXT, "--num-experts", "6", "--topk", "3"), "Qwen2MoeForCausalLM"),
    "branch_train_mix": Shipped("llama", False, _OTHERS),
    "expert_upcycling": Shipped("mixtral", True),
    "prune": Shipped("mixtral", False, (*_TEXT, "--num-experts", "3")),
    "merge": Shipped("mixtral", False, (*_TEXT, "--num-experts", "2")),
    "pre_softmax_calibrated": Shipped("qwen2", False, _TEXT, "Qwen2MoeForCausalLM"),
    "sigmoid_groups": Shipped("llama", True, architecture="Glm4MoeForCausalLM"),
    "hidden_state_router": Shipped("llama", True, ("--prompts", "{place}/prompts.yaml")),
    "paper_scaling": Shipped("llama", False),
    "distill": Shipped(
        "llama", False, (*_TEXT, "--distill-tokens", "1500", "--distill-lr", "3e-3", "--distill-batch", "64")
    ),
}


def test_every_recipe_has_a_case() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == SHIPPED.keys()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_does_what_it_says(name: str, place: Path, tmp_path: Path) -> None:
    case, recipe = SHIPPED[name], RECIPES / f"{name}.yaml"
    source, target = place / case.source, tmp_path / "moe"
    flags = [flag.format(place=place) for flag in case.flags]
    told = json.loads(run(source, target, "--recipe", recipe, *flags, "--json").stdout)
    assert json.loads((target / "config.json").read_text())["architectures"] == [case.architecture]
    assert told["report"] == json.loads((target / REPORT).read_text())
    assert told["report"]["passed"]
    assert told["report"]["is_exact"] == case.is_exact
    found = deviation(target, source)
    assert (found <= 1e-5) == case.is_exact
    assert told["report"]["logits"][0]["max_relative_difference"] == pytest.approx(found, rel=20, abs=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moe"]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_explains_itself(path: Path) -> None:
    lines = path.read_text().splitlines()
    comment = [line for line in lines if line.startswith("#")]
    assert 3 <= len(comment) <= 8
    assert lines[: len(comment)] == comment
    words = " ".join(line.lstrip("# ") for line in comment)
    assert "Take it" in words
    assert "xact" in words
    assert f"--recipe recipes/upcycle/{path.name}" in comment[-1]
    assert max(map(len, lines)) <= 120


def test_distillation_is_told_by_layer(place: Path, tmp_path: Path) -> None:
    words = ("--method", "split", "--num-experts", 4, "--distill-tokens", 1500, "--distill-lr", "3e-3")
    done = run(place / "llama", tmp_path / "moe", *words, "--distill-batch", 64)
    assert "layer 3: distilled from" in done.stdout
    layers = json.loads((tmp_path / "moe" / REPORT).read_text())["distilled"]
    assert [layer["layer"] for layer in layers] == [0, 1, 2, 3]
    assert all(layer["after"] < layer["before"] for layer in layers)
    run(place / "llama", tmp_path / "plain", "--method", "split", "--num-experts", 4)
    plain, trained = (json.loads((tmp_path / n / REPORT).read_text())["logits"][0]["kl"] for n in ("plain", "moe"))
    assert trained < plain


# ---- keys and flags -------------------------------------------------------------------------------------------------


def test_every_option_of_the_converters_is_a_key_and_a_flag() -> None:
    options = {option.name: option for option in fields(UpcycleSpec)}
    flags = {flag.name for flag in fields(MixtureFlags)}
    assert options.keys() <= UpcycleSection.model_fields.keys()
    for name, key in UpcycleSection.model_fields.items():
        if name in options and name != "num_experts":
            assert key.default == options[name].default, name
    assert flags == (UpcycleSection.model_fields.keys() - {"distill"}) | {
        f"distill_{name}" for name in DistillSection.model_fields
    }
    assert UpcycleSection(num_experts=8).spec() == UpcycleSpec(num_experts=8)


def test_flags_count_more_than_the_recipe(place: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "num_experts: 8\ntopk: 4\ngranularity: 2\npermute: true\nrouter_std: 1e-1\nlayers: '2:'\nto: qwen2_moe\n"
    )
    run(place / "llama", tmp_path / "a", "--recipe", recipe, "--topk", 2, "--no-permute", "--no-probe")
    words = ("--num-experts", 8, "--topk", 2, "--granularity", 2, "--router-std", 0.1, "--layers", "2:")
    run(place / "llama", tmp_path / "b", *words, "--to", "qwen2_moe", "--no-probe")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (config["num_experts"], config["num_experts_per_tok"]) == (8, 2)
    assert not (tmp_path / "a" / REPORT).exists()


def test_flags_of_distillation_join_the_recipes(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("num_experts: 4\ndistill:\n  tokens: 1000\n  lr: 1e-4\n")
    section = section_of(recipe, MixtureFlags(distill_tokens=50, distill_batch=7, others=[Path("a"), Path("b")]))
    assert section.distill == DistillSection(tokens=50, lr=1e-4, batch=7)
    assert section.others == [Path("a"), Path("b")]
    assert section_of(recipe, MixtureFlags()).distill == DistillSection(tokens=1000, lr=1e-4)
    assert section_of(None, MixtureFlags(num_experts=4, distill_tokens=9)).distill == DistillSection(tokens=9)
    assert section_of(None, MixtureFlags(num_experts=4)).distill is None


def test_megatrons_names_and_underscores_are_flags_too(place: Path, tmp_path: Path) -> None:
    words = ("--num-experts", 4, "--moe-router-topk", 2, "--moe-upcycling-granularity", 2, "--to", "mcore", "--ep", 2)
    told = json.loads(run(place / "llama", tmp_path / "moe", *words, "--json").stdout)
    assert told["target_format"] == "torch_dist"
    assert len(told["nbytes_by_rank"]) == 2
    assert (tmp_path / "moe" / REPORT).is_file()


# ---- the report -----------------------------------------------------------------------------------------------------


def test_the_report_is_printed_and_lies_beside_the_weights(place: Path, tmp_path: Path) -> None:
    words = (place / "llama", tmp_path / "moe", "--num-experts", 4, "--probe", place / "text.txt")
    done = run(*words)
    assert "copy is exact" in done.stdout
    assert "the text given" in done.stdout
    assert json.loads((tmp_path / "moe" / REPORT).read_text())["text"] == "the text given"
    quiet = run(*words, "--overwrite", "--quiet")
    assert quiet.stdout == ""
    assert (tmp_path / "moe" / REPORT).is_file()


@contextmanager
def a_fault(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The mixture's first experts are off by a percent, as a defect of the construction would have it."""
    sound = room.upcycled

    def faulty(*given: Any) -> Any:
        model = sound(*given)
        wrong = {n: scaled(t, 1.01) for n, t in model.tensors.items() if "experts.0.linear_fc2" in n}
        return replace(model, tensors={**model.tensors, **wrong})

    with monkeypatch.context() as patched:
        patched.setattr(room, "upcycled", faulty)
        yield


def test_a_mixture_that_should_be_exact_and_is_not_fails(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with a_fault(monkeypatch):
        done = run(place / "llama", tmp_path / "moe", "--num-experts", 4, code=1)
    assert "DEFECT: copy should be exact, but logits differ by" in shown(done)
    assert not json.loads((tmp_path / "moe" / REPORT).read_text())["passed"]


def test_a_run_that_stops_in_its_report_goes_on_there(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (place / "llama", tmp_path / "moe", "--num-experts", 4, "--to", "mcore")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Reporter, "file", stop)
        done = run(*words, code=130)
    assert "run again with --resume" in shown(done)
    assert not (tmp_path / "moe").exists()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "moe.partial").rglob("*.distcp")}
    assert written
    run(*words, "--resume")
    assert (tmp_path / "moe" / REPORT).is_file()
    for path, when in written.items():
        assert (tmp_path / "moe" / path.relative_to(tmp_path / "moe.partial")).stat().st_mtime_ns == when


def test_two_ranks_write_one_report(place: Path, tmp_path: Path) -> None:
    words = ("upcycle", place / "llama", tmp_path / "moe", "--num-experts", "4", "--to", "mcore", "--ep", "2", "--json")
    command = [sys.executable, "-m", "ckptbridge", *map(str, words)]
    ranks = [
        subprocess.Popen(command, env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"}, stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    told = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert json.loads(told[0])["report"]["passed"]
    assert told[1] == b""
    assert (tmp_path / "moe" / REPORT).is_file()


def test_a_plan_writes_nothing_and_runs_no_report(place: Path, tmp_path: Path) -> None:
    words = ("--num-experts", 4, "--method", "split", "--distill-tokens", 10**9, "--dry-run")
    done = run(place / "llama", tmp_path / "moe", *words)
    assert "Nothing was written" in done.stdout
    assert list(tmp_path.iterdir()) == []


# ---- refusals -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Refused:
    code: int
    flags: tuple[object, ...]
    words: tuple[str, ...]
    source: str = "llama"
    recipe: dict[str, Any] = field(default_factory=dict[str, Any])


REFUSED: dict[str, Refused] = {
    "no number of experts": Refused(2, (), ("--num-experts", "name a --recipe")),
    "no such method": Refused(2, ("--num-experts", 4, "--method", "clone"), ("--method", "clone", "virtual-group")),
    "a text that is not there": Refused(
        3, ("--num-experts", 4, "--calibrate", "none.txt"), ("none.txt: no such text file (calibrate)",)
    ),
    "top-k is no multiple": Refused(
        3,
        ("--num-experts", 4, "--granularity", 2, "--topk", 3),
        ("topk 3 is not a multiple of granularity 2", "Use --topk 2 or 4", "--allow-inexact"),
    ),
    "noise with groups": Refused(
        3,
        ("--num-experts", 4, "--granularity", 2, "--noise", 0.1),
        ("noise is 0.1 and granularity 2", "--allow-inexact"),
    ),
    "one expert a token": Refused(3, ("--num-experts", 4, "--topk", 1), ("topk is 1", "Use --topk 2")),
    "a class that cannot say it": Refused(
        3, ("--num-experts", 4, "--to", "qwen3_moe"), ("qk_layernorm", "--to mixtral")
    ),
    "no class of this name": Refused(3, ("--num-experts", 4, "--to", "llama"), ("--to llama", "mixtral", "mcore")),
    "a split without a text": Refused(
        3, ("--num-experts", 4, "--method", "cmoe"), ("decides by activations: give a text", "--calibrate FILE")
    ),
    "a router without prompts": Refused(
        3, ("--num-experts", 4, "--router-init", "hidden-state"), ("hidden-state needs prompts", "--prompts FILE")
    ),
    "a mixture of one model": Refused(
        3, ("--num-experts", 4, "--method", "branch-train-mix"), ("branch-train-mix mixes two models or more",)
    ),
    "more models than experts": Refused(
        3,
        ("--num-experts", 3, "--method", "branch-train-mix", "--with", "{place}/llama1"),
        ("num_experts is 3, but there are 2 models", "--num-experts 2"),
    ),
    "models that are not alike": Refused(
        3, ("--num-experts", 2, "--method", "branch-train-mix", "--with", "{place}/qwen2"), ("qwen2", "llama")
    ),
    "a dense method for a mixture": Refused(
        3, ("--num-experts", 8, "--method", "copy"), ("4 experts already", "expert-upcycling"), source="mixtral"
    ),
    "a mixture's method for a dense model": Refused(
        3, ("--num-experts", 2, "--method", "prune"), ("the source is a dense model", "prune is for mixtures")
    ),
    "fewer experts by upcycling": Refused(
        3,
        ("--num-experts", 2, "--method", "expert-upcycling"),
        ("num_experts is 2, but the source has 4", "prune and merge"),
        source="mixtral",
    ),
    "a layer that is not there": Refused(3, ("--num-experts", 4, "--layers", "0,7"), ("layers 0 to 3", "0,7")),
    "distillation of several models": Refused(
        3,
        ("--num-experts", 2, "--method", "branch-train-mix", "--with", "{place}/llama1", "--distill-tokens", 10),
        ("distill: the mixture of several models",),
    ),
    "a key that there is not": Refused(
        3, (), ("recipe.yaml", "unknown key num_expert, did you mean num_experts?"), recipe={"num_expert": 4}
    ),
    "a key of distillation": Refused(
        3,
        (),
        ("recipe.yaml", "unknown key distill.token, did you mean distill.tokens?"),
        recipe={"num_experts": 4, "distill": {"token": 4}},
    ),
    "distillation that is a number": Refused(
        3, (), ("recipe.yaml", "distill: input should be", "found 5"), recipe={"num_experts": 4, "distill": 5}
    ),
    "a value of another kind": Refused(
        3, (), ("recipe.yaml", "topk: input should be a valid integer, found 'two'"), recipe={"topk": "two"}
    ),
    "a word that is none": Refused(
        3,
        (),
        ("router: input should be 'renormalised', 'pre-softmax' or 'sigmoid', found 'softmax'",),
        recipe={"num_experts": 4, "router": "softmax"},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_in_a_sentence(name: str, place: Path, tmp_path: Path) -> None:
    case = REFUSED[name]
    flags = [str(flag).format(place=place) for flag in case.flags]
    if case.recipe:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(case.recipe))
        flags += ["--recipe", str(tmp_path / "recipe.yaml")]
    said = shown(run(place / case.source, tmp_path / "moe", *flags, code=case.code))
    for word in case.words:
        assert word in said, said
    assert "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == (["recipe.yaml"] if case.recipe else [])


def test_an_existing_target_is_kept_and_nothing_is_measured_first(place: Path, tmp_path: Path) -> None:
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "mine.txt").write_text("mine")
    words = ("--num-experts", 4, "--method", "cmoe", "--distill-tokens", 10**9, "--calibrate", place / "text.txt")
    said = shown(run(place / "llama", tmp_path / "moe", *words, code=3))
    assert "already exists" in said
    assert "--overwrite" in said
    assert [path.name for path in tmp_path.rglob("*")] == ["moe", "mine.txt"]


def test_what_cannot_work_is_done_when_asked_and_said(place: Path, tmp_path: Path) -> None:
    words = ("--num-experts", 4, "--granularity", 2, "--topk", 3, "--allow-inexact")
    done = run(place / "llama", tmp_path / "moe", *words)
    assert "virtual-group is not exact" in done.stdout
    assert "topk 3 is not a multiple of granularity 2" in shown(done)
