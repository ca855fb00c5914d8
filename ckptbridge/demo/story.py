"""The demo: Hugging Face -> Megatron-Core -> back -> mixture -> trained -> Hugging Face, each step proved."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.hf_folder import find_assets
from ckptbridge.converters.model import Model, count_parameters, open_model
from ckptbridge.converters.receipt import Receipt
from ckptbridge.converters.upcycling.construction import upcycled
from ckptbridge.converters.upcycling.spec import UpcycleSpec
from ckptbridge.demo.in_transformers import transformers_loss
from ckptbridge.demo.model import dense_model
from ckptbridge.demo.picture import draw
from ckptbridge.demo.stage import RESULTS_NAME, NotApplicable, Number, Outcome, Record, Show
from ckptbridge.demo.table import results_table
from ckptbridge.demo.text import data_section, held_out_files, held_out_tokens
from ckptbridge.trainer.log import read_log
from ckptbridge.trainer.loop import LOG_NAME, train
from ckptbridge.trainer.recipe import (
    EvaluationSection,
    ModelSection,
    MoeSection,
    OptimizerSection,
    Recipe,
    ScheduleSection,
)
from ckptbridge.trainer.verify import verify

SPEC = UpcycleSpec(num_experts=4, topk=2, granularity=2, method="virtual-group", router_std=0.3)
"""E2G2T2: two copies of the dense MLP, each cut into two experts of half its width; a token meets both of one copy.

Adam moves a router's weights by about the learning rate a step, and a token that this carries over the border
between the copies meets one shard twice and the other not at all. A router drawn fifteen times as wide as the usual
0.02 leaves few tokens near it: 16 steps of 1024 tokens at 1e-4 took SmolLM2's held-out loss from 2.58 to 2.46, where
0.1 took it to 2.51 and 0.02 let it rise to 2.74.
"""
SMOLLM2_STEPS, SMOLLM2_PARAMETERS = 24, 134_500_000
"""About two minutes of two CPU cores; larger models take fewer steps, down to 4."""
SEQUENCE, MICRO_BATCH, GLOBAL_BATCH, EVALUATION_BATCHES = 256, 2, 4, 8
EXACT_NATS = 1e-5
"""Two programs that compute the same model in fp32 differ by about 1e-7 nats a token."""
TRAINED_NATS = 1e-4
"""After training, router rows of a group are close but no longer equal: where rounding decides which expert a token
meets, the mean over 4096 tokens moves by up to 1e-4."""


def run_demo(
    folder: Path,
    model: str | None = None,
    steps: int | None = None,
    *,
    overwrite: bool = False,
    console: Console | None = None,
    quiet: bool = False,
    as_json: bool = False,
) -> dict[str, Any]:
    """Run the demo into `folder`; returns what `results.json` there holds. `passed` is False if a check failed.

    `model` is a Hub id or a folder, None SmolLM2-135M from its wheel. `quiet` prints failures only, `as_json` nothing.
    Raises BadInputError if the folder exists and may not be replaced.
    """
    _prepare(folder, overwrite)
    shown = None if as_json else console or Console(stderr=True)
    record = Record(folder=folder, console=shown, quiet=quiet)
    record.save()
    story = Story(folder=folder, choice=model, steps=steps)
    record.step("model", "dense model", (), story.get_model)
    record.step("hf2mcore", "HF -> Megatron-Core", ("model",), story.to_mcore)
    record.step("verify", "verify both sides", ("hf2mcore",), story.verify_both)
    record.step("mcore2hf", "Megatron-Core -> HF", ("hf2mcore",), story.back_to_hf)
    record.step("upcycle", "upcycle to a mixture", ("hf2mcore",), story.upcycle)
    record.step("train", "train the mixture", ("upcycle",), story.train)
    record.step("export", "export to transformers", ("train",), story.export)
    record.step("picture", "picture", ("train",), story.picture)
    results = record.save(finished=True)
    if shown is not None and not quiet:
        shown.print(results_table(results))
        verdict = "[bold green]all checks passed[/]" if results["passed"] else "[bold red]a check failed[/]"
        shown.print(f"{verdict}; everything lies in {folder}, its numbers in {folder / RESULTS_NAME}", soft_wrap=True)
    return results


def _prepare(folder: Path, overwrite: bool) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not overwrite:
            raise BadInputError(f"{folder}: exists already; name another with --folder, or replace it with --overwrite")
        if not (folder / RESULTS_NAME).is_file():
            raise BadInputError(f"{folder}: no demo's folder, so --overwrite does not replace it; name another")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)


@dataclass(slots=True)
class Story:
    """The steps in order; each leaves its folder and says what it found."""

    folder: Path
    choice: str | None
    steps: int | None
    hf: Path = field(init=False)
    """The dense model."""
    recipe: Recipe = field(init=False)
    held_out: tuple[float, float] = field(init=False)
    """Loss before and after training, by the trainer."""
    dense_loss: float | None = field(init=False, default=None)

    @property
    def mcore(self) -> Path:
        return self.folder / "mcore"

    @property
    def mixture(self) -> Path:
        return self.folder / "mixture-mcore"

    @property
    def exported(self) -> Path:
        return self.recipe.run_folder / "hf"

    def get_model(self, show: Show) -> Outcome:
        self.hf, name = dense_model(self.choice, self.folder / "hf")
        source = open_model(self.hf)
        parameters, _ = count_parameters(source.tensors, source.config)
        dtype = str(source.dtype).removeprefix("torch.")
        return Outcome(
            line=f"{source.family.architecture}, {_millions(parameters)} parameters, {dtype}: {name}",
            numbers={
                "parameters": Number(label="parameters", value=parameters, text=_millions(parameters)),
                "layers": Number(label="layers", value=source.config.num_layers, text=str(source.config.num_layers)),
                "nbytes": _megabytes("weights", sum(tensor.nbytes for tensor in source.sources.values())),
            },
        )

    def to_mcore(self, show: Show) -> Outcome:
        receipt = _convert(open_model(self.hf), self.mcore, "torch_dist", show)
        tensors = len(receipt.source_tensors)
        return Outcome(
            line=f"{tensors} tensors as a torch_dist checkpoint that Megatron loads at any layout: {self.mcore}",
            numbers={
                "tensors": Number(label="tensors converted", value=tensors, text=str(tensors)),
                "nbytes": _megabytes("written", receipt.target_nbytes),
            },
        )

    def verify_both(self, show: Show) -> Outcome:
        report = verify(self.hf, self.mcore)
        agreement = report.argmax_agreement
        return Outcome(
            line=(
                f"transformers {report.loss_a:.6f}, Megatron side {report.loss_b:.6f} nats a token "
                f"on {report.tokens} tokens of {report.text}"
            ),
            numbers={
                "loss_hf": _nats("loss, transformers", report.loss_a),
                "loss_mcore": _nats("loss, Megatron side", report.loss_b),
                "difference": _at_most("loss difference", report.loss_difference, EXACT_NATS),
                "kl": _at_most("KL divergence", report.kl, EXACT_NATS),
                "argmax_agreement": Number(
                    label="same most likely token",
                    value=agreement,
                    text=f"{agreement:.2%}",
                    wanted="100 %",
                    passed=agreement == 1,
                ),
            },
        )

    def back_to_hf(self, show: Show) -> Outcome:
        back = self.folder / "hf-back"
        _convert(open_model(self.mcore), back, "hf", show)
        before, after = open_model(self.hf).sources, open_model(back).sources
        same = sum(name in after and _same_bits(before[name], after[name]) for name in before)
        files = [self.hf / "config.json", *find_assets(self.hf)]
        copies = sum((back / f.name).is_file() and (back / f.name).read_bytes() == f.read_bytes() for f in files)
        extra = len(after.keys() - before.keys())
        return Outcome(
            line=f"{same} of {len(before)} tensors bit-identical, config and tokenizer byte for byte: {back}",
            numbers={
                "identical_tensors": _all_of("bit-identical tensors", same, len(before)),
                "extra_tensors": Number(
                    label="tensors too many", value=extra, text=str(extra), wanted="0", passed=not extra
                ),
                "identical_files": _all_of("identical config, tokenizer", copies, len(files)),
            },
        )

    def upcycle(self, show: Show) -> Outcome:
        dense = open_model(self.mcore)
        try:
            mixture = upcycled(dense, SPEC)
        except BadInputError as error:
            raise NotApplicable(f"this model cannot be upcycled: {error}") from error
        # The bar is half full when the conversion is done: comparing takes the other half.
        _convert(mixture, self.mixture, "torch_dist", lambda done, total, told: show(done, 2 * total, told))
        total, active = count_parameters(mixture.tensors, mixture.config)
        report = verify(self.hf, self.mixture)
        return Outcome(
            line=(
                f"4 experts of width {mixture.config.moe_ffn_hidden_size}, top-2, {_millions(total)} parameters "
                f"({_millions(active)} active): loss {report.loss_b:.6f}, the dense model's is {report.loss_a:.6f}"
            ),
            numbers={
                "parameters": Number(label="parameters", value=total, text=_millions(total)),
                "active_parameters": Number(label="active parameters", value=active, text=_millions(active)),
                "loss_dense": _nats("loss, dense", report.loss_a),
                "loss_mixture": _nats("loss, mixture", report.loss_b),
                "difference": _at_most("loss difference", report.loss_difference, EXACT_NATS),
            },
        )

    def train(self, show: Show) -> Outcome:
        source = open_model(self.mixture)
        self.recipe = self._make_recipe(source)
        total = self.recipe.schedule.total_steps
        show(0, total, "reading the text")

        def on_step(record: dict[str, Any]) -> None:
            kind = "loss" if "loss" in record else "held_out_loss"
            # One more than the steps: saving and exporting come after the last of them.
            show(record["step"], total + 1, f"{kind.replace('_', '-', 1).replace('_', ' ')} {record[kind]:.4f}")

        result = train(self.recipe, on_step=on_step)
        before, after = result.held_out_before, result.held_out_after
        if before is None or after is None:
            raise BadInputError(f"{result.log}: holds no held-out loss")
        self.held_out = before, after
        records = [r for r in read_log(result.log) if "loss" in r]
        speed = sum(r["tokens_per_s"] for r in records) / len(records)
        files = held_out_files(self.recipe.data)
        return Outcome(
            line=(
                f"{result.steps} steps, {records[-1]['tokens']} tokens of the standard library: loss on "
                f"{len(files)} held-out files {before:.4f} -> {after:.4f} nats a token"
            ),
            numbers={
                "steps": Number(label="steps", value=result.steps, text=str(result.steps)),
                "tokens": Number(
                    label="tokens trained on", value=records[-1]["tokens"], text=str(records[-1]["tokens"])
                ),
                "tokens_per_second": Number(label="tokens a second", value=speed, text=f"{speed:.0f}"),
                "held_out_files": Number(
                    label="held-out files", value=[str(path) for path in files], text=str(len(files))
                ),
                "train_loss": _nats("training loss, last batch", records[-1]["loss"]),
                "held_out_before": _nats("held-out loss before", before),
                "held_out_curve": Number(
                    label="held-out loss during",
                    value=[r["held_out_loss"] for r in records if "held_out_loss" in r],
                    text=", ".join(f"{r['held_out_loss']:.3f}" for r in records[:-1] if "held_out_loss" in r),
                ),
                "held_out_after": Number(
                    label="held-out loss after",
                    value=after,
                    text=f"{after:.6f}",
                    wanted=f"< {before:.4f}",
                    passed=after < before,
                ),
            },
        )

    def export(self, show: Show) -> Outcome:
        source = open_model(self.exported)
        batches = held_out_tokens(
            self.recipe.data, self.recipe.evaluation.batches, self.exported, source.config.vocab_size
        )
        total, tokens = 2 * len(batches), sum(batch[:, 1:].numel() for batch in batches)
        name, loss = transformers_loss(self.exported, batches, lambda done: show(done, total, "the mixture"))
        _, self.dense_loss = transformers_loss(
            self.hf, batches, lambda done: show(len(batches) + done, total, "the dense model")
        )
        wanted = source.family.architecture
        return Outcome(
            line=f"{name}: held-out loss {loss:.6f}, the trainer says {self.held_out[1]:.6f}: {self.exported}",
            numbers={
                "class": Number(label="class", value=name, text=name, wanted="the same", passed=name == wanted),
                "held_out_tokens": Number(label="held-out tokens", value=tokens, text=str(tokens)),
                "loss_transformers": _nats("held-out loss, transformers", loss),
                "difference": _at_most("its difference", abs(loss - self.held_out[1]), TRAINED_NATS),
                "loss_dense": _nats("held-out loss, dense model", self.dense_loss),
                "dense_difference": _at_most(
                    "its difference, untrained", abs(self.dense_loss - self.held_out[0]), EXACT_NATS
                ),
            },
        )

    def picture(self, show: Show) -> Outcome:
        path = self.folder / "demo.png"
        dense_loss = self.held_out[0] if self.dense_loss is None else self.dense_loss
        name = self.choice or "SmolLM2-135M"
        title = f"{name} as a mixture of {SPEC.num_experts} experts, trained on Python's standard library"
        draw(path, read_log(self.recipe.run_folder / LOG_NAME), dense_loss, title)
        return Outcome(line=f"loss curves and expert load: {path}", numbers={})

    def _make_recipe(self, source: Model) -> Recipe:
        _, active = count_parameters(source.tensors, source.config)
        steps = self.steps or max(4, min(SMOLLM2_STEPS, round(SMOLLM2_STEPS * SMOLLM2_PARAMETERS / active)))
        return Recipe(
            run_folder=self.folder / "run",
            model=ModelSection(init_from=str(self.mixture)),
            data=data_section(min(SEQUENCE, source.config.max_position_embeddings), MICRO_BATCH, GLOBAL_BATCH),
            optimizer=OptimizerSection(lr=1e-4),
            schedule=ScheduleSection(total_steps=steps, warmup_steps=min(2, steps - 1), min_lr=1e-5),
            moe=MoeSection(aux_loss_coeff=1e-3),
            # The same numbers on every machine, whether it has a GPU or not.
            device="cpu",
            evaluation=EvaluationSection(every=max(1, steps // 8), batches=EVALUATION_BATCHES),
        )


def _convert(source: Model, target: Path, to: Any, show: Show) -> Receipt:
    plan = plan_conversion(source, target, to, ConvertOptions())
    return execute(plan, lambda done, total: show(done, total, f"{total / 1e6:.0f} MB"))


def _same_bits(a: Any, b: Any) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return torch.equal(a.read().view(torch.uint8), b.read().view(torch.uint8))


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:.1f}M"


def _megabytes(label: str, nbytes: int) -> Number:
    return Number(label=label, value=nbytes, text=f"{nbytes / 1e6:.1f} MB")


def _nats(label: str, loss: float) -> Number:
    return Number(label=label, value=loss, text=f"{loss:.6f}")


def _at_most(label: str, value: float, limit: float) -> Number:
    return Number(label=label, value=value, text=f"{value:.1e}", wanted=f"<= {limit:.0e}", passed=value <= limit)


def _all_of(label: str, found: int, wanted: int) -> Number:
    return Number(label=label, value=found, text=str(found), wanted=str(wanted), passed=found == wanted)
