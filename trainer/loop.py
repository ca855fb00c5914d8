"""Training from a recipe to an exported model. Running the same recipe again resumes where it was."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ckptbridge.converters.errors import BadInputError, StorageError
from ckptbridge.converters.model import Model, decoder_tensors
from ckptbridge.trainer.checkpoint import complete_checkpoints, resume, save
from ckptbridge.trainer.computed import TRAINED, refuse_beyond
from ckptbridge.trainer.data import TokenStream, held_out_batches
from ckptbridge.trainer.decoder import Decoder
from ckptbridge.trainer.documents import Documents
from ckptbridge.trainer.export import export_hf, trained_model
from ckptbridge.trainer.loading import check_values, empty_decoder
from ckptbridge.trainer.log import StepLog, load_summary, peak_memory_bytes, read_log
from ckptbridge.trainer.machine import machine_of
from ckptbridge.trainer.optimizer import Optimizer
from ckptbridge.trainer.recipe import Recipe
from ckptbridge.trainer.recipe_file import save_recipe
from ckptbridge.trainer.schedule import Schedule
from ckptbridge.trainer.source import open_source
from ckptbridge.trainer.step import accumulate_gradients, evaluate
from ckptbridge.trainer.tokens import Tokens, load_tokenizer, tokenize

LOG_NAME = "train.jsonl"
DISTILLED = "distilled"
"""Where the layers lie that `model.upcycle.distill` trained."""
OnStep = Callable[[dict[str, Any]], None]
"""Called with each record as it is logged; record 0 holds the held-out loss before training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What a finished run left behind."""

    log: Path
    steps: int
    resumed_from: int
    checkpoint: Path
    """The newest checkpoint's folder."""
    hf: Path | None
    """The exported Hugging Face folder, if one was asked for."""
    held_out_before: float | None
    held_out_after: float | None
    kernels: str
    """The sentence that says which kernels ran, and why."""


def train(recipe: Recipe, on_step: OnStep | None = None) -> TrainResult:
    """Train until `schedule.total_steps`, from the recipe's model or from the run folder's newest checkpoint.

    Leaves in the run folder: recipe.yaml (resolved), tokens/, train.jsonl (a line a step), checkpoints/ (torch_dist)
    and hf/. Raises BadInputError or StorageError; an interrupted run continues when it is started again.
    """
    try:
        return _train(recipe, on_step)
    except OSError as error:
        raise StorageError(f"{error.filename or recipe.run_folder}: {error.strerror or error}") from error


def _train(recipe: Recipe, on_step: OnStep | None) -> TrainResult:
    run = recipe.run_folder
    run.mkdir(parents=True, exist_ok=True)
    with machine_of(recipe) as machine:
        source = open_source(recipe.model, run / DISTILLED)
        refuse_beyond(source.config, TRAINED, "training")
        save_recipe(recipe, run / "recipe.yaml")
        tokens = _tokens(recipe, source)
        stream = TokenStream(tokens, recipe.data)
        held_out = held_out_batches(tokens, recipe.data, recipe.evaluation.batches)

        decoder = empty_decoder(source.config, machine.backend, machine.dtype, machine.device)
        optimizer = Optimizer(decoder, recipe.optimizer)
        first = resume(run / "checkpoints", optimizer=optimizer, stream=stream)
        if not first:
            optimizer.load_weights(decoder_tensors(source.tensors, source.config))
        check_values(decoder)

        log = StepLog(run / LOG_NAME, first)
        if held_out and not first:
            _record(log, {"step": 0, "held_out_loss": evaluate(decoder, held_out)}, on_step)
        for step in range(first + 1, recipe.schedule.total_steps + 1):
            record = _step(recipe, source, decoder, optimizer, stream, step)
            if held_out and _is_due(step, recipe.evaluation.every, recipe):
                record["held_out_loss"] = evaluate(decoder, held_out)
            _record(log, record, on_step)
            if _is_due(step, recipe.checkpoint.save_every, recipe):
                save(
                    run / "checkpoints",
                    model=trained_model(source, decoder, run),
                    decoder=decoder,
                    optimizer=optimizer,
                    stream=stream,
                    step=step,
                    keep=recipe.checkpoint.keep,
                )
        hf = export_hf(source, decoder, run / "hf") if recipe.export.hf else None
    return _result(recipe, first, hf, machine.reason)


def _tokens(recipe: Recipe, source: Model) -> Tokens:
    named = recipe.data.tokenizer
    tokenizers = [asset.parent for asset in source.assets if asset.name.startswith("tokenizer")]
    if named is None and not tokenizers:
        raise BadInputError(f"{source.path}: the model comes without a tokenizer; name one with data.tokenizer")
    tokenizer = load_tokenizer(Path(named).expanduser() if named else tokenizers[0])
    return tokenize(Documents(recipe.data), tokenizer, source.config.vocab_size, recipe.run_folder / "tokens")


def _step(
    recipe: Recipe, source: Model, decoder: Decoder, optimizer: Optimizer, stream: TokenStream, step: int
) -> dict[str, Any]:
    """Take one step and describe it."""
    started = time.perf_counter()
    options = recipe.schedule
    schedule = Schedule(
        lr=recipe.optimizer.lr,
        min_lr=options.min_lr,
        warmup_steps=options.warmup_steps,
        total_steps=options.total_steps,
    )
    coefficient = recipe.moe.aux_loss_coeff
    if coefficient is None:
        coefficient = source.config.moe_aux_loss_coeff
    device = decoder.output_weight_VH.device
    batch = stream.next(recipe.data.global_batch_size).to(device)
    result = accumulate_gradients(decoder, batch, recipe.data.micro_batch_size, coefficient)
    grad_norm = optimizer.step(schedule.at(step))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    return {
        "step": step,
        "loss": result.loss,
        "lr": schedule.at(step),
        "grad_norm": grad_norm,
        "tokens": step * result.tokens,
        "tokens_per_s": round(result.tokens / seconds, 1),
        "step_ms": round(seconds * 1000, 1),
        "peak_memory_bytes": peak_memory_bytes(device),
        **load_summary(result, whole=_is_due(step, recipe.evaluation.every, recipe)),
    }


def _is_due(step: int, every: int, recipe: Recipe) -> bool:
    """Whether something done every so many steps, and after the last one, is done after this one."""
    return step == recipe.schedule.total_steps or bool(every and step % every == 0)


def _record(log: StepLog, record: dict[str, Any], on_step: OnStep | None) -> None:
    log.write(record)
    if on_step:
        on_step(record)


def _result(recipe: Recipe, first: int, hf: Path | None, kernels: str) -> TrainResult:
    log = recipe.run_folder / LOG_NAME
    records = read_log(log)
    held_out = [record["held_out_loss"] for record in records if "held_out_loss" in record]
    return TrainResult(
        log=log,
        steps=records[-1]["step"],
        resumed_from=first,
        checkpoint=complete_checkpoints(recipe.run_folder / "checkpoints")[-1],
        hf=hf,
        held_out_before=held_out[0] if held_out else None,
        held_out_after=held_out[-1] if held_out else None,
        kernels=kernels,
    )
