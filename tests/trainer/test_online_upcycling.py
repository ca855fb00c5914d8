"""Training from `model.upcycle`: bit for bit what `upcycle --to mcore` and then training give, with nothing written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from typer.testing import CliRunner

from ckptbridge.cli import app
from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import decoder_tensors, open_model
from ckptbridge.converters.training_checkpoint import load_training_checkpoint
from ckptbridge.converters.upcycling.construction import upcycled
from ckptbridge.trainer.log import read_log
from ckptbridge.trainer.loop import TrainResult, train
from ckptbridge.trainer.recipe_file import parse_recipe, with_overrides
from ckptbridge.trainer.source import open_source
from ckptbridge.trainer.upcycle_recipe import UpcycleSection
from tests.tiny import save_tiny
from tests.trainer.text import save_tokenizer, write_documents

STEPS = 4
MIXTURES: dict[str, dict[str, Any]] = {
    "copies": {"num_experts": 4, "topk": 2},
    "groups": {"num_experts": 8, "topk": 4, "granularity": 4, "router_std": 0.3, "permute": True},
    "shared": {"num_experts": 4, "topk": 2, "granularity": 2, "shared": "partition", "to": "qwen2_moe", "layers": "1:"},
    "drop": {"num_experts": 4, "method": "drop", "noise": 0.01},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("online")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        save_tiny("llama", place / name, dtype)
        save_tokenizer(place / name)
    write_documents(place / "texts")
    return place


def recipe_values(place: Path, run: str, model: dict[str, Any], precision: str = "fp32") -> dict[str, Any]:
    return {
        "run_folder": str(place / run),
        "model": model,
        "data": {
            "text": [str(place / "texts")],
            "sequence_length": 16,
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "held_out_fraction": 0.2,
        },
        "optimizer": {"lr": 3e-3},
        "schedule": {"total_steps": STEPS, "warmup_steps": 1},
        "checkpoint": {"save_every": 2, "keep": 2},
        "evaluation": {"batches": 2},
        "precision": precision,
        "threads": 1,
    }


def run(values: dict[str, Any], *overrides: str, on_step: Any = None) -> TrainResult:
    return train(parse_recipe(with_overrides(values, overrides)), on_step)


def as_told(folder: Path) -> list[dict[str, Any]]:
    """The log without what the clock and the operating system decide."""
    varying = ("step_ms", "tokens_per_s", "peak_memory_bytes", "planned_memory_bytes", "tflops", "mfu", "graph")
    return [{k: v for k, v in record.items() if k not in varying} for record in read_log(folder / "train.jsonl")]


def saved_tensors(folder: Path, step: int = STEPS) -> dict[str, Tensor]:
    """Every tensor of a checkpoint: weights and optimizer."""
    checkpoint = load_training_checkpoint(folder / "checkpoints" / f"iter_{step:07d}")
    states = {"weight": decoder_tensors(checkpoint.model.tensors, checkpoint.model.config), **checkpoint.optimizer}
    return {f"{state} {name}": t.read() for state, tensors in states.items() for name, t in tensors.items()}


def assert_same_run(one: Path, other: Path) -> None:
    assert as_told(one) == as_told(other)
    ours, theirs = saved_tensors(one), saved_tensors(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    for name in ("model.safetensors", "config.json"):
        assert (one / "hf" / name).read_bytes() == (other / "hf" / name).read_bytes()


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_online_is_offline_bit_for_bit(precision: str, kind: str, place: Path) -> None:
    dense, name = place / precision, f"{precision} {kind}"
    mixture = upcycled(open_model(dense), UpcycleSection(**MIXTURES[kind]).spec())
    execute(plan_conversion(mixture, place / name / "mixture", "torch_dist"))
    online = {"init_from": str(dense), "upcycle": MIXTURES[kind]}
    offline = {"init_from": str(place / name / "mixture")}

    # The weights that a run loads ...
    source = open_source(parse_recipe(recipe_values(place, "x", online)).model, place / "x")
    written = open_model(place / name / "mixture")
    assert source.config == written.config
    assert source.tensors.keys() == written.tensors.keys()
    for tensor_name, tensor in source.tensors.items():
        assert torch.equal(tensor.read(), written.tensors[tensor_name].read()), tensor_name
        assert tensor.dtype == written.tensors[tensor_name].dtype

    # ... and what it makes of them.
    run(recipe_values(place, f"{name}/online", online, precision))
    run(recipe_values(place, f"{name}/offline", offline, precision))
    assert_same_run(place / name / "online", place / name / "offline")


def test_what_a_text_and_other_models_decide_is_decided_alike(place: Path) -> None:
    """Against the command line itself: it measures, writes, and the run reads what it wrote."""
    (place / "text.txt").write_text((place / "texts" / "03.txt").read_text())
    cases: dict[str, dict[str, Any]] = {
        "cmoe": {"num_experts": 6, "topk": 3, "method": "cmoe", "calibrate": str(place / "text.txt")},
        "mix": {"num_experts": 2, "method": "branch-train-mix", "others": [str(place / "bf16 as fp32")]},
    }
    model = open_model(place / "bf16")
    execute(plan_conversion(model, place / "bf16 as fp32", "hf", ConvertOptions(dtype=torch.float32)))
    for name, upcycle in cases.items():
        (place / f"{name}.yaml").write_text(yaml.safe_dump(upcycle))
        words = ["upcycle", place / "fp32", place / name, "--recipe", place / f"{name}.yaml", "--to", "mcore"]
        done = CliRunner().invoke(app, [*map(str, words), "--no-probe"])
        assert done.exit_code == 0, done.output
        run(recipe_values(place, f"online {name}", {"init_from": str(place / "fp32"), "upcycle": upcycle}))
        run(recipe_values(place, f"offline {name}", {"init_from": str(place / name)}))
        assert_same_run(place / f"online {name}", place / f"offline {name}")


def test_the_comparison_sees_another_seed(place: Path) -> None:
    for seed in (0, 1):
        model = {"init_from": str(place / "fp32"), "upcycle": {**MIXTURES["copies"], "seed": seed}}
        run(recipe_values(place, f"seed {seed}", model))
    with pytest.raises(AssertionError):
        assert_same_run(place / "seed 0", place / "seed 1")


def test_nothing_of_a_mixture_is_on_disk_before_the_first_checkpoint(place: Path) -> None:
    values = recipe_values(place, "bare", {"init_from": str(place / "fp32"), "upcycle": MIXTURES["groups"]})
    before, seen = files_of(place / "fp32"), dict[int, set[str]]()
    run(values, on_step=lambda record: seen.update({record["step"]: files_of(place / "bare")}))
    bare = {".lock", "recipe.yaml", "train.jsonl", "tokens/index.json", "tokens/train.bin", "tokens/held_out.bin"}
    assert seen[0] == seen[1] == seen[2] == bare  # a step is told of before its checkpoint is written
    assert any(name.endswith(".distcp") for name in seen[3])
    assert files_of(place / "fp32") == before


def test_an_interrupted_run_continues_bit_for_bit(place: Path) -> None:
    def interrupt(record: dict[str, Any]) -> None:
        if record["step"] == 3:
            raise KeyboardInterrupt

    model = {"init_from": str(place / "bf16"), "upcycle": MIXTURES["groups"]}
    run(recipe_values(place, "whole", model, "bf16"))
    broken = recipe_values(place, "broken", model, "bf16")
    with pytest.raises(KeyboardInterrupt):
        run(broken, on_step=interrupt)
    assert run(broken).resumed_from == 2
    assert_same_run(place / "whole", place / "broken")


def test_the_loss_before_the_first_step_is_the_dense_one(place: Path) -> None:
    run(recipe_values(place, "dense", {"init_from": str(place / "fp32")}), "schedule.total_steps=2")
    dense = as_told(place / "dense")[0]["held_out_loss"]
    for kind in ("copies", "groups", "shared"):
        model = {"init_from": str(place / "fp32"), "upcycle": MIXTURES[kind]}
        run(recipe_values(place, f"first {kind}", model), "schedule.total_steps=2")
        assert as_told(place / f"first {kind}")[0]["held_out_loss"] == pytest.approx(dense, abs=1e-6)


def test_distilled_layers_are_trained_once_and_lie_in_the_run_folder(place: Path) -> None:
    upcycle = {"num_experts": 4, "method": "split", "distill": {"tokens": 300, "lr": 3e-3}}
    values = recipe_values(place, "distilled run", {"init_from": str(place / "fp32"), "upcycle": upcycle})
    run(values, "schedule.total_steps=2")
    layers = sorted((place / "distilled run" / "distilled").glob("*.safetensors"))
    assert len(layers) == 4
    written = layers[0].stat().st_mtime_ns
    assert run(values).resumed_from == 2
    assert layers[0].stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("upcycle", "said"),
    [
        ({"num_expert": 4}, "unknown key model.upcycle.num_expert, did you mean model.upcycle.num_experts?"),
        ({"topk": 2}, "model.upcycle.num_experts is missing"),
        ({"num_experts": 4, "method": "copys"}, "model.upcycle.method: input should be 'copy', 'virtual-group'"),
        ({"num_experts": 4, "distill": {"token": 3}}, "did you mean model.upcycle.distill.tokens?"),
        ({"num_experts": 4, "probe": "text.txt"}, "belong to `ckptbridge upcycle`"),
        ({"num_experts": 4, "topk": "2"}, "model.upcycle.topk: input should be a valid integer, found '2'"),
    ],
)
def test_recipes_that_are_wrong_are_refused_by_key(upcycle: dict[str, Any], said: str, place: Path) -> None:
    with pytest.raises(BadInputError) as refused:
        parse_recipe(recipe_values(place, "refused", {"init_from": "x", "upcycle": upcycle}))
    assert said in str(refused.value)


def test_mixtures_that_are_not_exact_are_refused_by_a_run_too(place: Path) -> None:
    upcycle = {"num_experts": 8, "granularity": 2, "topk": 3}
    with pytest.raises(BadInputError, match="topk 3 is not a multiple of granularity 2"):
        run(recipe_values(place, "inexact", {"init_from": str(place / "fp32"), "upcycle": upcycle}))
