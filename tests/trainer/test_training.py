"""Whole runs: against a plain torch loop over transformers' model, killed and resumed, and exported."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from ckptbridge.converters.errors import BadInputError, StorageError
from ckptbridge.converters.model import decoder_tensors, open_model
from ckptbridge.converters.training_checkpoint import load_training_checkpoint
from ckptbridge.trainer.checkpoint import complete_checkpoints
from ckptbridge.trainer.data import TokenStream, held_out_batches
from ckptbridge.trainer.documents import Documents
from ckptbridge.trainer.log import read_log
from ckptbridge.trainer.loop import TrainResult, train
from ckptbridge.trainer.recipe_file import parse_recipe, with_overrides
from ckptbridge.trainer.tokens import load_tokenizer, tokenize
from tests.tiny import build_tiny, save_tiny
from tests.trainer.text import save_tokenizer, write_documents

STEPS, COEFFICIENT = 6, 0.02
LR = 5e-4
"""Of the comparison with a plain loop. Adam's first steps move a weight by lr however small its gradient, so a gradient
of zero plus rounding moves by lr in either direction: at 3e-3 that alone is worth 1.2e-5 nats."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models (and a tokenizer each) and text."""
    place = tmp_path_factory.mktemp("training")
    for name in ("llama_tied", "mixtral", "qwen2_moe"):
        save_tiny(name, place / name)
        save_tokenizer(place / name)
    write_documents(place / "texts")
    return place


def recipe_values(place: Path, model: str, run: str) -> dict[str, Any]:
    return {
        "run_folder": str(place / run),
        "model": {"init_from": str(place / model)},
        "data": {
            "text": [str(place / "texts")],
            "sequence_length": 16,
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "held_out_fraction": 0.2,
        },
        "optimizer": {"lr": 3e-3, "clip_grad": 1.5},
        "schedule": {"total_steps": STEPS, "warmup_steps": 2, "min_lr": 3e-4},
        "moe": {"aux_loss_coeff": COEFFICIENT},
        "checkpoint": {"save_every": 3},
        "evaluation": {"every": 3, "batches": 2},
        "threads": 1,
    }


def run(
    values: dict[str, Any], *overrides: str, on_step: Callable[[dict[str, Any]], None] | None = None
) -> TrainResult:
    return train(parse_recipe(with_overrides(values, overrides)), on_step)


def plain_losses(place: Path, values: dict[str, Any], name: str, *, clip: float, coefficient: float) -> list[float]:
    """The same training as a loop over transformers' model that shares nothing with the trainer but the batches."""
    data = parse_recipe(values).data
    tokens = tokenize(Documents(data), load_tokenizer(place / name), 250, place / "plain tokens")
    stream, model = TokenStream(tokens, data), build_tiny(name)
    adam = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    losses = []
    for rate in [LR / 2, *(LR / 10 + 0.9 * LR * (1 + math.cos(math.pi * i / 5)) / 2 for i in range(5))]:
        batch = stream.next(4)
        loss = 0.0
        for micro in batch.split(2):
            loss = loss + _plain_loss(model, micro, coefficient, losses)
        losses[-2:] = [sum(losses[-2:]) / 2]
        (loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
        adam.zero_grad()
    return losses


def _plain_loss(model: torch.nn.Module, micro: Tensor, coefficient: float, losses: list[float]) -> Tensor:
    moe = hasattr(model.config, "num_experts_per_tok")
    output = model(micro[:, :-1], **({"output_router_logits": True} if moe else {}))
    loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), micro[:, 1:].flatten())
    losses.append(loss.item())
    for logits in output.router_logits if moe else ():
        probabilities = logits.softmax(-1)
        experts = probabilities.shape[1]
        chosen = probabilities.topk(model.config.num_experts_per_tok, -1).indices
        share = torch.nn.functional.one_hot(chosen, experts).float().mean((0, 1))
        loss = loss + coefficient * experts * (share * probabilities.mean(0)).sum()
    return loss


@pytest.mark.parametrize("name", ["llama_tied", "mixtral", "qwen2_moe"])
def test_losses_equal_a_plain_loop_over_transformers(name: str, place: Path) -> None:
    values = recipe_values(place, name, f"run {name}")
    run(values, f"optimizer.lr={LR}", f"schedule.min_lr={LR / 10}")
    records = read_log(place / f"run {name}" / "train.jsonl")
    ours = [record["loss"] for record in records if "loss" in record]
    plain = plain_losses(place, values, name, clip=1.5, coefficient=COEFFICIENT)
    assert len(ours) == STEPS
    assert ours == pytest.approx(plain, abs=1e-5)
    assert max(record.get("grad_norm", 0) for record in records) > 1.5, "clipping was never at work"
    # The oracle must see what it is there to see.
    assert ours != pytest.approx(plain_losses(place, values, name, clip=9.0, coefficient=COEFFICIENT), abs=1e-5)
    if name != "llama_tied":
        assert ours != pytest.approx(plain_losses(place, values, name, clip=1.5, coefficient=0.0), abs=1e-5)


def test_the_z_loss_is_logged_where_it_is_trained(place: Path) -> None:
    for coefficient, is_told in ((0.0, False), (1e-3, True)):
        result = run(
            recipe_values(place, "mixtral", f"z {coefficient}"),
            f"moe.z_loss_coeff={coefficient}",
            "schedule.total_steps=3",
        )
        told = [record.get("z_loss") for record in read_log(result.log)[1:]]
        assert all(z_loss > 0 for z_loss in told) if is_told else told == [None] * 3


def test_the_log_and_the_export_say_the_same(place: Path) -> None:
    from transformers import AutoModelForCausalLM

    values = recipe_values(place, "mixtral", "exported")
    seen: list[dict[str, Any]] = []
    result = run(values, on_step=seen.append)
    assert seen == read_log(result.log)
    assert [record["step"] for record in seen] == list(range(STEPS + 1))
    assert [record["step"] for record in seen if "held_out_loss" in record] == [0, 3, 6]
    assert seen[-1]["tokens"] == STEPS * 4 * 16
    load = seen[-1]["expert_load"]
    assert load["layers"] == [0, 1, 2, 3]
    for low, high, shares in zip(load["min"], load["max"], load["fraction"], strict=True):
        assert (low, high) == (min(shares), max(shares))
        assert sum(shares) == pytest.approx(1, abs=1e-3)
    assert (result.steps, result.resumed_from) == (STEPS, 0)
    assert result.held_out_after < result.held_out_before - 0.5

    model = AutoModelForCausalLM.from_pretrained(result.hf, dtype="auto")
    assert type(model).__name__ == "MixtralForCausalLM"
    assert model.dtype == torch.float32
    data = parse_recipe(values).data
    tokens = tokenize(Documents(data), load_tokenizer(result.hf), 250, place / "exported" / "tokens")
    losses = [
        torch.nn.functional.cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten()).item()
        for batch in held_out_batches(tokens, data, 2)
    ]
    assert sum(losses) / 2 == pytest.approx(result.held_out_after, abs=1e-5)


def as_told(folder: Path) -> list[dict[str, Any]]:
    """The log without what the clock and the operating system decide."""
    varying = ("step_ms", "tokens_per_s", "peak_memory_bytes", "planned_memory_bytes", "tflops", "mfu", "graph")
    return [{k: v for k, v in record.items() if k not in varying} for record in read_log(folder / "train.jsonl")]


def saved_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint: weights and optimizer."""
    checkpoint = load_training_checkpoint(folder)
    states = {"weight": decoder_tensors(checkpoint.model.tensors, checkpoint.model.config), **checkpoint.optimizer}
    return {f"{state} {name}": t.read() for state, tensors in states.items() for name, t in tensors.items()}


def assert_same_run(one: Path, other: Path) -> None:
    assert as_told(one) == as_told(other)
    ours, theirs = (saved_tensors(folder / "checkpoints" / f"iter_{STEPS:07d}") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    assert {name.split()[0] for name in ours} == {"weight", "param", "exp_avg", "exp_avg_sq"}
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert (one / "hf" / "model.safetensors").read_bytes() == (other / "hf" / "model.safetensors").read_bytes()


def test_a_killed_run_continues_bit_for_bit_in_another_process(place: Path) -> None:
    """kill -9 after step 4, with a checkpoint of step 3: the second process takes steps 4 to 6 again."""
    recipe = place / "killed.yaml"
    recipe.write_text(yaml.safe_dump(recipe_values(place, "mixtral", "killed")))
    command = [sys.executable, "-m", "ckptbridge.trainer", str(recipe), "--set", "moe.aux_loss_coeff=3e-2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout
        for line in process.stdout:
            if json.loads(line)["step"] == 4:
                process.kill()
    assert read_log(place / "killed" / "train.jsonl")[-1]["step"] >= 4
    assert not (place / "killed" / "hf").exists()
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert [json.loads(line)["step"] for line in finished.stdout.splitlines()] == [4, 5, 6]

    run(recipe_values(place, "mixtral", "unbroken"), "moe.aux_loss_coeff=3e-2")
    assert_same_run(place / "killed", place / "unbroken")


@pytest.mark.parametrize(
    ("model", "precision", "moments"),
    [("qwen2_moe", "bf16", "fp32"), ("llama_tied", "fp32", "fp32"), ("llama_tied", "bf16", "bf16")],
)
def test_an_interrupted_run_continues_bit_for_bit(model: str, precision: str, moments: str, place: Path) -> None:
    def interrupt(record: dict[str, Any]) -> None:
        if record["step"] == 5:
            raise KeyboardInterrupt

    one, other = (recipe_values(place, model, f"{kind} {model} {precision}") for kind in ("whole", "broken"))
    options = (f"precision={precision}", f"optimizer.moments={moments}")
    run(one, *options)
    with pytest.raises(KeyboardInterrupt):
        run(other, *options, on_step=interrupt)
    torch.manual_seed(99)
    assert run(other, *options).resumed_from == 3
    assert_same_run(Path(one["run_folder"]), Path(other["run_folder"]))


def test_a_finished_run_is_not_trained_again(place: Path) -> None:
    values = recipe_values(place, "llama_tied", "finished")
    run(values)
    before = as_told(place / "finished")
    result = run(values, on_step=lambda record: pytest.fail(f"took {record}"))
    assert (result.resumed_from, result.steps) == (STEPS, STEPS)
    assert as_told(place / "finished") == before


def test_only_the_newest_checkpoints_stay_and_unfinished_ones_do_not_count(place: Path) -> None:
    values = recipe_values(place, "llama_tied", "kept")
    result = run(values, "checkpoint.save_every=1", "checkpoint.keep=2", "export.hf=false")
    assert result.hf is None
    assert not (place / "kept" / "hf").exists()
    root = place / "kept" / "checkpoints"
    (root / "iter_0000009.partial").mkdir()
    assert [folder.name for folder in complete_checkpoints(root)] == ["iter_0000005", "iter_0000006"]
    assert result.checkpoint == root / "iter_0000006"


def test_a_run_does_not_resume_on_other_text(place: Path) -> None:
    values = recipe_values(place, "llama_tied", "moved")
    run(values)
    with pytest.raises(BadInputError, match=r"data\.seed was 0, now it is 1"):
        run(values, "data.seed=1")
    with pytest.raises(BadInputError, match="the text was"):
        run(values, "data.max_documents=9")


def test_a_model_without_tokenizer_needs_one_named(place: Path, tiny_folder: Callable[[str], Path]) -> None:
    values = recipe_values(place, "llama_tied", "nameless") | {"model": {"init_from": str(tiny_folder("llama"))}}
    with pytest.raises(BadInputError, match="without a tokenizer"):
        run(values)
    assert run(values, f"data.tokenizer={place / 'llama_tied'}", "schedule.total_steps=3").steps == 3


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.init_from=nowhere", "nowhere"),
        ("data.sequence_length=9000", "too few"),
        ("data.tokenizer=nowhere", "nowhere: no tokenizer"),
        ("data.text=[nowhere]", "nowhere"),
    ],
)
def test_what_cannot_run_is_refused_in_a_sentence(override: str, said: str, place: Path) -> None:
    with pytest.raises(BadInputError, match=said):
        run(recipe_values(place, "llama_tied", "refused"), override)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("memory.offload=activations", "memory.offload: activations leave a GPU"),
        ("kernels.graph=on", "kernels.graph: a CUDA graph was asked for"),
    ],
)
def test_what_needs_a_gpu_is_refused_without_one(override: str, said: str, place: Path) -> None:
    with pytest.raises(BadInputError, match=said):
        run(recipe_values(place, "llama_tied", "no gpu"), override, "device=cpu")


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_no_number_of_a_run(recompute: str, place: Path) -> None:
    one, other = (recipe_values(place, "qwen2_moe", name) for name in ("all kept", f"recomputed {recompute}"))
    if not (place / "all kept").exists():
        run(one, "export.hf=false")
    run(other, "export.hf=false", f"memory.recompute={recompute}")
    assert as_told(place / "all kept") == as_told(Path(other["run_folder"]))


def test_a_run_folder_that_cannot_be_made_is_a_failing_disk(place: Path) -> None:
    (place / "file").write_text("in the way")
    with pytest.raises(StorageError, match="file/run"):
        run(recipe_values(place, "llama_tied", "file/run"))


def test_a_bf16_run_says_so_in_every_config(place: Path) -> None:
    values = recipe_values(place, "llama_tied", "rounded")
    result = run(values, "precision=bf16", "schedule.total_steps=3")
    assert result.hf
    for folder in (result.hf, place / "rounded" / "checkpoints" / "hf"):
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert {model.dtype for model in map(open_model, (result.hf, result.checkpoint))} == {torch.bfloat16}


def test_the_module_tells_errors_in_a_line(place: Path) -> None:
    command = [sys.executable, "-m", "ckptbridge.trainer", str(place / "absent.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert finished.returncode == 3
    assert finished.stderr == f"error: {place / 'absent.yaml'}: there is no such recipe\n"
