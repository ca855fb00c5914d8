"""The command line as a user meets it: exit codes, messages, JSON, real processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file, save_file

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run() -> Run:
    """`ckptbridge ...` in a process of its own, with warnings as errors."""

    def call(*words: object, check: int | None = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ckptbridge", *map(str, words)]
        environment = {**os.environ, "COLUMNS": "200", "HF_HUB_OFFLINE": "1", "TERM": "dumb"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if check is not None:
            assert done.returncode == check, done.stdout + done.stderr
        return done

    return call


@pytest.fixture
def llama(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("llama")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_there_and_back_is_bit_identical(run: Run, llama: Path, tmp_path: Path) -> None:
    done = run("hf2mcore", llama, tmp_path / "mcore", "--tp", 2, "--pp", 2)
    assert "LlamaForCausalLM" in done.stdout
    assert (tmp_path / "mcore" / "latest_checkpointed_iteration.txt").read_text() == "release"
    run("mcore2hf", tmp_path / "mcore", tmp_path / "back")
    before, after = tensors_of(llama), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (llama / "config.json").read_bytes() == (tmp_path / "back" / "config.json").read_bytes()


def test_what_is_complete_is_not_told_as_written_again(run: Run, llama: Path, tmp_path: Path) -> None:
    words = ("hf2mcore", llama, tmp_path / "mcore")
    assert json.loads(run(*words, "--json").stdout)["was_complete"] is False
    assert "nothing was written" in run(*words, "--resume").stdout
    assert json.loads(run(*words, "--resume", "--json").stdout)["was_complete"] is True
    replaced = run(*words, "--overwrite").stdout
    assert "written as torch_dist" in replaced
    assert "nothing was written" not in replaced


def test_json_is_one_object_and_nothing_else(run: Run, llama: Path, tmp_path: Path) -> None:
    done = run("hf2mcore", llama, tmp_path / "mcore", "--json")
    assert json.loads(done.stdout)["family"] == "llama"
    assert not done.stderr
    told = json.loads(run("inspect", tmp_path / "mcore", "--json").stdout)
    assert told["format"] == "torch_dist"
    assert told["parameters"] == sum(tensor.numel() for tensor in tensors_of(llama).values())
    failed = run("inspect", tmp_path / "nothing", "--json", check=3)
    assert json.loads(failed.stdout)["exit_code"] == 3


WRONG_USAGE = {
    "a value": (("hf2mcore", "{llama}", "{tmp}/out", "--tp", "zero", "--json"), "--tp"),
    "a value that the verb checks": (
        ("reshard", "a", "b", "--no-optimizer", "--optimizer-format", "plain", "--json"),
        "",
    ),
    "a flag": (("inspect", "--json", "{llama}", "--bogus"), "--bogus"),
    "a verb": (("convert", "{llama}", "--json"), "convert"),
    "no argument": (("train", "--json"), "RECIPE"),
    "of a plan": (("plan", "hf2mcore", "{llama}", "{tmp}/out", "--tp", "zero", "--json"), "--tp"),
    "no verb to plan": (("plan", "--json"), "hf2mcore|mcore2hf|reshard|upcycle"),
    "of a verb below a verb": (("launch", "megatron", "--json"), "path"),
}


@pytest.mark.parametrize("name", WRONG_USAGE)
def test_wrong_usage_is_one_json_object_too(run: Run, llama: Path, tmp_path: Path, name: str) -> None:
    words, message = WRONG_USAGE[name]
    done = run(*(word.format(llama=llama, tmp=tmp_path) for word in words), check=2)
    told = json.loads(done.stdout)
    assert told.keys() == {"error", "exit_code"}
    assert told["exit_code"] == 2
    assert message in told["error"]
    assert "Error" in done.stderr  # for a person, as without --json
    assert not run(*(word.format(llama=llama, tmp=tmp_path) for word in words if word != "--json"), check=2).stdout


def test_quiet_prints_nothing(run: Run, llama: Path, tmp_path: Path) -> None:
    done = run("hf2mcore", llama, tmp_path / "mcore", "--quiet")
    assert done.stdout == done.stderr == ""


def test_flags_may_be_written_with_underscores(run: Run, llama: Path, tmp_path: Path) -> None:
    run("hf2mcore", llama, tmp_path / "mcore", "--tensor_model_parallel_size=2", "--per_layer_keys")
    told = json.loads(run("inspect", tmp_path / "mcore", "--json").stdout)
    assert told["layout"]["tp"] == 2


@pytest.mark.parametrize("form", [("plan", "hf2mcore"), ("hf2mcore",)])
def test_a_plan_writes_nothing_and_names_every_route(
    run: Run, llama: Path, tmp_path: Path, form: tuple[str, ...]
) -> None:
    target = tmp_path / "mcore"
    flags = [] if form[0] == "plan" else ["--dry-run"]
    told = json.loads(run(*form, llama, target, "--tp", 2, "--json", *flags).stdout)
    assert told["tensors_in"] == len(tensors_of(llama))
    assert told["routes"]["decoder.layers.3.mlp.linear_fc1.weight"] == [
        "model.layers.3.mlp.gate_proj.weight",
        "model.layers.3.mlp.up_proj.weight",
    ]
    assert "release/__1_0.distcp" in told["files"]
    shown = run(*form, llama, target, "--tp", 2, *flags).stdout
    assert "model.layers.{0...3}.self_attn.q_proj.weight" in shown
    assert list(tmp_path.iterdir()) == []


def test_plan_alone_says_how_it_is_used(run: Run) -> None:
    assert "hf2mcore|mcore2hf|reshard|upcycle" in run("plan", check=2).stderr
    assert "hf2mcore|mcore2hf|reshard|upcycle" in run("plan", "--help").stdout
    assert "--target-mcore" in run("plan", "hf2mcore", "--help").stdout


def test_flags_of_a_plan_may_stand_before_the_verb(run: Run, llama: Path, tmp_path: Path) -> None:
    told = json.loads(run("plan", "--json", "--tp", 2, "hf2mcore", llama, tmp_path / "mcore").stdout)
    assert len(told["nbytes_by_rank"]) == 2


def test_a_quiet_plan_is_a_plan_without_its_notes(run: Run, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "mcore").mkdir()
    loud, quiet = (run("plan", "hf2mcore", llama, tmp_path / "mcore", *flags) for flags in ((), ("--quiet",)))
    assert quiet.stdout == loud.stdout
    assert "Nothing was written" in quiet.stdout
    assert "note" in loud.stderr
    assert not quiet.stderr


def test_a_plan_says_what_would_make_the_run_refuse(run: Run, llama: Path, tmp_path: Path) -> None:
    def notes(*words: object) -> str:
        return " ".join(json.loads(run("plan", *words, "--json").stdout)["notes"])

    target, other = tmp_path / "mcore", tmp_path / "other"
    assert "exists" not in notes("hf2mcore", llama, target)
    run("hf2mcore", llama, target)
    assert f"{target} exists already" in notes("hf2mcore", llama, target)
    assert f"{target} exists already" in notes("reshard", target, target, "--tp", 2)
    assert "exists" not in notes("hf2mcore", llama, target, "--overwrite")
    partial = tmp_path / "other.partial"
    partial.mkdir()
    assert "other.partial" not in notes("hf2mcore", llama, other)
    (partial / "begun").write_text("")
    assert f"{partial} is left of an earlier run" in notes("hf2mcore", llama, other)
    assert "other.partial" not in notes("hf2mcore", llama, other, "--resume")


def test_verify_passes_and_fails_with_its_exit_code(run: Run, llama: Path, tmp_path: Path) -> None:
    run("hf2mcore", llama, tmp_path / "mcore")
    told = json.loads(run("verify", llama, tmp_path / "mcore", "--tokens", 64, "--json").stdout)
    assert told["passed"]
    assert told["loss_difference"] < 1e-6

    broken = tmp_path / "broken"
    shutil.copytree(llama, broken)
    tensors = load_file(broken / "model.safetensors")
    gate_proj, up_proj = (f"model.layers.2.mlp.{name}_proj.weight" for name in ("gate", "up"))
    tensors[gate_proj], tensors[up_proj] = tensors[up_proj], tensors[gate_proj]
    save_file(tensors, broken / "model.safetensors")
    done = run("verify", llama, broken, "--tokens", 64, "--junit", tmp_path / "junit.xml", check=1)
    assert "decoder.layers.2" in done.stdout
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert suite.get("failures") == "1"


def test_a_receipt_is_checked_again(run: Run, llama: Path, tmp_path: Path) -> None:
    run("hf2mcore", llama, tmp_path / "mcore")
    receipt = tmp_path / "mcore" / "ckptbridge_receipt.json"
    assert json.loads(run("verify", tmp_path / "mcore", "--against-receipt", receipt, "--json").stdout)["passed"]
    file = tmp_path / "mcore" / "release" / "__0_0.distcp"
    blob = bytearray(file.read_bytes())
    blob[4000] ^= 1
    file.write_bytes(blob)
    done = run("verify", tmp_path / "mcore", "--against-receipt", receipt, check=1)
    assert "changed: embedding.word_embeddings.weight@0,0" in done.stdout
    assert "--against-receipt" in run("verify", tmp_path / "mcore", check=2).stderr


def test_diff_names_what_was_swapped(run: Run, llama: Path, tmp_path: Path) -> None:
    run("hf2mcore", llama, tmp_path / "mcore")
    assert json.loads(run("diff", llama, tmp_path / "mcore", "--json").stdout)["same"]
    broken = tmp_path / "broken"
    shutil.copytree(llama, broken)
    tensors = load_file(broken / "model.safetensors")
    gate_proj, up_proj = (f"model.layers.2.mlp.{name}_proj.weight" for name in ("gate", "up"))
    tensors[gate_proj], tensors[up_proj] = tensors[up_proj], tensors[gate_proj]
    save_file(tensors, broken / "model.safetensors")
    assert "gate_proj and up_proj swapped" in run("diff", broken, tmp_path / "mcore", check=1).stdout


def test_upcycled_model_computes_the_dense_loss(run: Run, llama: Path, tmp_path: Path) -> None:
    words = ("--num-experts", 4, "--granularity", 2, "--topk", 2)
    run("upcycle", llama, tmp_path / "moe", *words)
    told = json.loads(run("verify", llama, tmp_path / "moe", "--tokens", 64, "--json").stdout)
    assert told["passed"], told
    run("upcycle", llama, tmp_path / "moe-mcore", *words, "--to", "mcore", "--ep", 2)
    assert json.loads(run("verify", tmp_path / "moe", tmp_path / "moe-mcore", "--tokens", 64, "--json").stdout)[
        "passed"
    ]


BAD_CALLS = {
    "no such folder": (3, ("inspect", "{tmp}/nowhere"), "no such folder"),
    "a mistyped path to what the Hub does not have": (
        3,
        ("reshard", "runs/iter_1", "{tmp}/out"),
        "runs/iter_1: no such folder, and Megatron checkpoints are not read from the Hub",
    ),
    "the same to Hugging Face": (3, ("mcore2hf", "runs/iter_1", "{tmp}/out"), "are not read from the Hub"),
    "the same for its flags": (3, ("launch", "megatron", "runs/iter_1"), "are not read from the Hub"),
    "wrong side": (3, ("mcore2hf", "{llama}", "{tmp}/out"), "ckptbridge hf2mcore"),
    "tp does not divide": (
        3,
        ("hf2mcore", "{llama}", "{tmp}/out", "--tp", "3"),
        "does not divide num_attention_heads = 8",
    ),
    "experts of a dense model": (3, ("hf2mcore", "{llama}", "{tmp}/out", "--ep", "2"), "has no experts"),
    "top-k is no multiple": (
        3,
        ("upcycle", "{llama}", "{tmp}/out", "--num-experts", "4", "--granularity", "2", "--topk", "3"),
        "Use --topk 2 or 4",
    ),
    "unknown flag": (2, ("hf2mcore", "{llama}", "{tmp}/out", "--bogus"), "--bogus"),
    "no size": (2, ("mcore2hf", "{llama}", "{tmp}/out", "--max-shard-size", "big"), "5GB or 512MiB"),
    "names of modules that the format does not have": (
        2,
        ("hf2mcore", "{llama}", "{tmp}/out", "--module-names", "local"),
        "local goes with --format torch",
    ),
    "no text": (3, ("verify", "{llama}", "{llama}", "--text", "{tmp}/none.txt"), "no such text file"),
    "no recipe": (3, ("train", "{tmp}/none.yaml"), "none.yaml"),
    "hub id without a network": (4, ("inspect", "nobody/nothing"), "nobody/nothing"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_end_in_their_exit_code_and_one_message(run: Run, llama: Path, tmp_path: Path, name: str) -> None:
    code, words, message = BAD_CALLS[name]
    done = run(*(word.format(llama=llama, tmp=tmp_path) for word in words), check=code)
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_debug_shows_the_traceback(run: Run, tmp_path: Path) -> None:
    assert "Traceback" in run("inspect", tmp_path / "nowhere", "--debug", check=None).stderr


def test_an_existing_target_is_kept_unless_told(run: Run, llama: Path, tmp_path: Path) -> None:
    run("hf2mcore", llama, tmp_path / "mcore")
    assert "--overwrite" in run("hf2mcore", llama, tmp_path / "mcore", check=3).stderr
    run("hf2mcore", llama, tmp_path / "mcore", "--overwrite", "--tp", 2)
    told = json.loads(run("inspect", tmp_path / "mcore", "--json").stdout)
    assert told["layout"]["tp"] == 2


def test_help_is_there_before_torch(run: Run) -> None:
    probe = "import sys; sys.argv = ['ckptbridge', '--help']\nfrom ckptbridge.__main__ import main\n"
    probe += "try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True)
    for verb in ("hf2mcore", "mcore2hf", "upcycle", "verify", "inspect", "train", "demo"):
        assert "--json" in run(verb, "--help").stdout


def test_a_checkpoint_of_an_unknown_architecture_is_shown_as_it_stands(run: Run, llama: Path, tmp_path: Path) -> None:
    strange = shutil.copytree(llama, tmp_path / "strange")
    config = (strange / "config.json").read_text().replace("LlamaForCausalLM", "StrangeForCausalLM")
    (strange / "config.json").write_text(config)
    done = run("inspect", strange, check=3)
    assert "model.layers.{0...3}.mlp.gate_proj.weight" in done.stdout
    assert "StrangeForCausalLM" in done.stderr


def test_reshard_gives_a_checkpoint_another_layout_and_format(run: Run, llama: Path, tmp_path: Path) -> None:
    run("hf2mcore", llama, tmp_path / "legacy", "--format", "torch", "--tp", 2, "--module-names", "local")
    assert (tmp_path / "legacy" / "release" / "mp_rank_01" / "model_optim_rng.pt").is_file()
    planned = json.loads(run("plan", "reshard", tmp_path / "legacy", tmp_path / "x", "--pp", 2, "--json").stdout)
    assert planned["source_format"] == "torch"
    assert planned["target_format"] == "torch_dist"
    run("reshard", tmp_path / "legacy", tmp_path / "again", "--pp", 2)
    run("mcore2hf", tmp_path / "again", tmp_path / "back")
    before, after = tensors_of(llama), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    run("reshard", llama, tmp_path / "no", check=3)
    contradiction = run(
        "reshard", tmp_path / "again", tmp_path / "no", "--no-optimizer", "--optimizer-format", "plain", check=2
    )
    assert "--no-optimizer" in contradiction.stderr


def test_weights_that_are_not_finite_are_told_and_refused_when_asked(run: Run, llama: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(llama, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    refused = run("hf2mcore", broken, tmp_path / "no", "--check-finite", check=3)
    assert "model.norm.weight" in refused.stderr
    assert not (tmp_path / "no").exists()
    told = run("hf2mcore", broken, tmp_path / "mcore")
    assert "model.norm.weight" in told.stdout + told.stderr
