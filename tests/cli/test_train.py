"""`train` as a user meets it: what it prints, what it plans, and where it says that the time went."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ckptbridge.trainer.profile_trace import read_trace
from ckptbridge.verbs.train import told
from tests.tiny import save_tiny
from tests.trainer.text import save_tokenizer, write_documents

TRITON = "The figures are those of the Triton kernels (kernels.backend auto on a GPU, or triton)."


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("train")
    save_tiny("mixtral", place / "model")
    save_tokenizer(place / "model")
    write_documents(place / "texts")
    values: dict[str, Any] = {
        "run_folder": str(place / "run"),
        "model": {"init_from": str(place / "model")},
        "data": {"text": [str(place / "texts")], "sequence_length": 16, "global_batch_size": 2},
        "schedule": {"total_steps": 5},
        "export": {"hf": False},
        "kernels": {"graph": "auto"},
        "threads": 1,
    }
    (place / "recipe.yaml").write_text(yaml.safe_dump(values))
    return place / "recipe.yaml"


NO_MODEL_RUNS = """
import sys, torch
def run(*_, **__):
    raise AssertionError("a model was run")
torch.nn.functional.scaled_dot_product_attention = run
from ckptbridge.__main__ import main
main()
"""
"""The command line in a process where attention cannot be computed."""


def run(*words: object, prefix: tuple[str, ...] = (sys.executable, "-m", "ckptbridge"), code: int = 0) -> str:
    command = [*prefix, "train", *map(str, words)]
    environment = {**os.environ, "COLUMNS": "200", "TERM": "dumb", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def test_a_plan_needs_no_gpu_and_writes_nothing(recipe: Path) -> None:
    plain, bf16 = (json.loads(run(recipe, "--plan", "--json", *more)) for more in ((), ("--set", "precision=bf16")))
    assert plain["main_weights"] == 0
    assert bf16["state"] == plain["state"] * 18 // 16
    assert plain["total"] == plain["state"] + plain["activations"] + plain["largest_temporary"] + plain["workspace"]
    lines = run(recipe, "--plan").splitlines()
    assert lines[0].split()[0] == "weights"
    assert lines[-2].startswith("in all")
    assert lines[-1] == TRITON
    assert not (recipe.parent / "run").exists()


def test_a_plan_of_a_mixture_measures_and_distils_nothing(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    text = (write_documents(tmp_path / "texts") / "00.txt").rename(tmp_path / "text.txt")
    upcycle = {"num_experts": 4, "topk": 2, "method": "cmoe", "calibrate": str(text), "distill": {"tokens": 64}}
    values: dict[str, Any] = {
        "run_folder": str(tmp_path / "run"),
        "model": {"init_from": str(tmp_path / "model"), "upcycle": upcycle},
        "data": {"text": ["nowhere"], "sequence_length": 256},
        "schedule": {"total_steps": 5},
        "moe": {"aux_loss_coeff": 0.0},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    words = (tmp_path / "recipe.yaml", "--plan", "--json", "--set", "kernels.backend=reference")
    planned = json.loads(run(*words, prefix=(sys.executable, "-c", NO_MODEL_RUNS)))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    kernels, length, balance = planned["notes"]
    assert kernels == TRITON.removesuffix(".") + (
        ". This recipe asks for reference, whose memory is not planned and may be more."
    )
    assert length.startswith("data.sequence_length 256 is beyond the model's max_position_embeddings 128")
    assert balance.startswith("Nothing balances the experts: moe.aux_loss_coeff is 0")
    assert planned["state"] == json.loads(run(*words, "--set", "model.upcycle.distill=null"))["state"]


def test_a_plan_of_what_is_not_trained_is_refused(tmp_path: Path, recipe: Path) -> None:
    save_tiny("gemma2", tmp_path / "gemma2")
    told = run(recipe, "--plan", "--json", "--set", f"model.init_from={tmp_path / 'gemma2'}", code=3)
    assert "Gemma2ForCausalLM cannot be trained" in json.loads(told)["error"]


def test_a_profile_is_a_trace_and_a_table_with_floors(recipe: Path) -> None:
    told = json.loads(run(recipe, "--profile", 2, "--no-graph", "--json"))
    assert told["notes"] == ["Steps are launched operation by operation (kernels.graph is off)."]
    profile = told["profile"]
    assert profile["steps"] == 2
    parts = {part["part"]: part for part in profile["parts"]}
    assert {"attention", "router", "dispatch", "expert products", "combine", "norms", "optimizer"} <= set(parts)
    assert sum(part["share"] for part in parts.values()) == pytest.approx(1)
    assert all(part["floor_ms"] > 0 for name, part in parts.items() if name != "other")
    assert sum(part["ms"] for part in parts.values()) == pytest.approx(profile["busy_ms"])
    assert profile["busy_ms"] <= profile["step_ms"]
    assert profile == json.loads((recipe.parent / "run" / "profile" / "table.json").read_text())
    assert any(event.get("name") == "part: Router" for event in read_trace(Path(profile["trace"])))


def test_a_profile_ends_with_the_run_or_says_why_there_is_none(recipe: Path) -> None:
    short, shorter = (("--set", f"run_folder={recipe.parent / name}") for name in ("short", "shorter"))
    ends = json.loads(run(recipe, *short, "--profile", 9, "--set", "schedule.total_steps=4", "--json"))
    assert ends["profile"]["steps"] == 2
    none = json.loads(run(recipe, *shorter, "--profile", 9, "--set", "schedule.total_steps=2", "--json"))
    assert none["profile"] is None
    assert none["notes"][-1] == "No step was profiled: the run ends before step 3."


def test_a_step_is_told_on_one_line() -> None:
    record = {"loss": 2.5, "tokens_per_s": 12345.6, "peak_memory_bytes": 3 << 30}
    assert told(record) == "loss 2.5000, 12346 tokens/s, 3.0 GiB"
    on_gpu = told(record | {"tflops": 512.3, "mfu": 0.518})
    assert on_gpu == "loss 2.5000, 12346 tokens/s, 512 TFLOP/s, MFU 51.8%, 3.0 GiB"
