"""Training from a recipe to an exported model. Running the same recipe again resumes where it was."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ckptbridge.converters.errors import BadInputError, StorageError
from ckptbridge.converters.model import Model, decoder_tensors
from ckptbridge.trainer.activation_memory import spare_memory
from ckptbridge.trainer.attention import use_attention
from ckptbridge.trainer.capacity import Capacity
from ckptbridge.trainer.checkpoint import CHECKPOINTS, newest_checkpoint, remove_unfinished, resume, save
from ckptbridge.trainer.data import TokenStream, held_out_batches
from ckptbridge.trainer.decoder import Decoder
from ckptbridge.trainer.divergence import lost_numbers, refuse_divergence, refuse_unlikely_weights
from ckptbridge.trainer.documents import Documents
from ckptbridge.trainer.export import check_export, export_hf, trained_model
from ckptbridge.trainer.loading import check_values, empty_decoder
from ckptbridge.trainer.log import LOG_NAME, StepLog, free_memory_bytes, load_summary, peak_memory_bytes
from ckptbridge.trainer.machine import Machine, machine_of
from ckptbridge.trainer.memory_plan import GIB, MemoryPlan, plan_run, verdict
from ckptbridge.trainer.mixture import limit_experts, use_products
from ckptbridge.trainer.optimizer import Optimizer
from ckptbridge.trainer.products import capture_obstacle
from ckptbridge.trainer.profile_floors import Rates, costs, measured_rates
from ckptbridge.trainer.profile_run import Profiler, ProfileWindow
from ckptbridge.trainer.recipe import MoeSection, Recipe
from ckptbridge.trainer.recipe_file import save_recipe
from ckptbridge.trainer.result import TrainResult, result_of
from ckptbridge.trainer.run_lock import only_one
from ckptbridge.trainer.run_notes import notes_of
from ckptbridge.trainer.same_model import describe_model, describe_upcycling, refuse_other_model
from ckptbridge.trainer.schedule import Schedule
from ckptbridge.trainer.source import open_source
from ckptbridge.trainer.step import evaluate
from ckptbridge.trainer.throughput import Throughput, throughput_of
from ckptbridge.trainer.tokens import Tokens, load_tokenizer, tokenize
from ckptbridge.trainer.update import Update

PROFILE = "profile"
"""Where the trace and the table of profiled steps lie."""
PROFILED_FROM = 3
"""The first step of a run that may be profiled: kernels are compiled and caches filled by then."""
DISTILLED = "distilled"
"""Where the layers lie that `model.upcycle.distill` trained."""
_LESS_MEMORY = "lower data.micro_batch_size, or set memory.recompute, memory.offload or optimizer.moments=bf16"
OnStep = Callable[[dict[str, Any]], None]
"""Called with each record as it is logged; record 0 holds the held-out loss before training."""
OnNote = Callable[[str], None]
"""Called before the first step with each sentence of `run_notes`; the result has them too."""


def train(
    recipe: Recipe, on_step: OnStep | None = None, on_note: OnNote | None = None, *, profiled_steps: int = 0
) -> TrainResult:
    """Train until `schedule.total_steps`, from the recipe's model or from the run folder's newest checkpoint.

    Leaves in the run folder: recipe.yaml (resolved), tokens/, train.jsonl (a line a step), checkpoints/ (torch_dist)
    and hf/; with `profiled_steps` also profile/, of so many steps behind the first ones. Raises BadInputError or
    StorageError; an interrupted run continues when it is started again.
    """
    try:
        recipe.run_folder.mkdir(parents=True, exist_ok=True)
        with only_one(recipe.run_folder), machine_of(recipe) as machine:
            return _train(recipe, machine, on_step, on_note, profiled_steps)
    except torch.OutOfMemoryError as error:
        said, _, _ = str(error).partition("\n")
        raise BadInputError(
            f"the GPU has too little memory for this run: {said[:300]}\n{_LESS_MEMORY}; "
            "the run then continues from its newest checkpoint"
        ) from error
    except OSError as error:
        raise StorageError(f"{error.filename or recipe.run_folder}: {error.strerror or error}") from error


def _train(
    recipe: Recipe, machine: Machine, on_step: OnStep | None, on_note: OnNote | None, profiled_steps: int
) -> TrainResult:
    run, root = recipe.run_folder, recipe.run_folder / CHECKPOINTS
    saved = newest_checkpoint(root)
    if saved is not None:  # before layers are distilled for a mixture that nobody would use
        refuse_other_model(saved.described, describe_upcycling(recipe.model), saved.folder)
    source = open_source(recipe.model, run / DISTILLED)
    described = describe_model(source, recipe.model)
    if saved is not None:
        refuse_other_model(saved.described, described, saved.folder)
    if recipe.export.hf:
        check_export(source, machine.dtype, run)
    tokens = _tokens(recipe, source)
    stream = TokenStream(tokens, recipe.data)
    held_out = held_out_batches(tokens, recipe.data, recipe.evaluation.batches)

    free = free_memory_bytes(machine.device)
    plan = _plan(source, recipe, machine, free)
    # Before there is a model, whose memory may be all that the device has.
    rates = measured_rates(machine.device, machine.dtype) if profiled_steps else None
    decoder = empty_decoder(source.config, machine.backend, machine.dtype, machine.device)
    limit_experts(decoder, _capacity(recipe.moe))
    use_attention(decoder, machine.attention)
    use_products(decoder, machine.products)
    optimizer = Optimizer(decoder, recipe.optimizer, machine.backend)
    if saved is not None:
        first = resume(saved, decoder=decoder, optimizer=optimizer, stream=stream)
    else:
        first = 0
        optimizer.load_weights(decoder_tensors(source.tensors, source.config))
        check_values(decoder)

    schedule = Schedule(
        lr=recipe.optimizer.lr,
        min_lr=recipe.schedule.min_lr,
        warmup_steps=recipe.schedule.warmup_steps,
        total_steps=recipe.schedule.total_steps,
    )
    # Behind the optimizer, which moves the weights: what is a weight is known by its place.
    spare_memory(decoder, recompute=recipe.memory.recompute, offload=recipe.memory.offload == "activations")
    update = _update(recipe, decoder, optimizer)
    throughput = throughput_of(decoder, recipe.data.sequence_length, recipe.data.global_batch_size)
    window = None if rates is None else _profiled(recipe, decoder, rates, first, profiled_steps)
    log = StepLog(run / LOG_NAME, first)
    # Nothing refuses the run any more: from here on the folder is this recipe's.
    save_recipe(recipe, run / "recipe.yaml")
    remove_unfinished(root)
    notes = notes_of(recipe, source.config, tokens)
    if on_note:
        for note in notes:
            on_note(note)
    if held_out and not first:
        _record(log, {"step": 0, "held_out_loss": evaluate(decoder, held_out)}, recipe, on_step)
    for step in range(first + 1, recipe.schedule.total_steps + 1):
        with nullcontext() if window is None else window.step(step) as is_profiled:
            record = _step(recipe, schedule, update, throughput, stream, step, bool(is_profiled))
        if plan is not None and step in (first + 1, recipe.schedule.total_steps):
            record["planned_memory_bytes"] = plan.total
        if held_out and _is_due(step, recipe.evaluation.every, recipe) and not lost_numbers(record):
            record["held_out_loss"] = evaluate(decoder, held_out)
        _record(log, record, recipe, on_step)
        if _is_due(step, recipe.checkpoint.save_every, recipe):
            refuse_unlikely_weights(decoder, step, recipe)
            save(
                root,
                model=trained_model(source, decoder, run),
                described=described,
                decoder=decoder,
                optimizer=optimizer,
                stream=stream,
                step=step,
                keep=recipe.checkpoint.keep,
            )
    hf = export_hf(source, decoder, run) if recipe.export.hf else None
    profile = None if window is None else window.profile
    told = [machine.reason, update.graph_sentence, None if plan is None else plan.sentence(free)]
    told += notes
    if profiled_steps and window is None:
        told.append(f"No step was profiled: the run ends before step {first + PROFILED_FROM}.")
    return result_of(run, first, hf, [sentence for sentence in told if sentence is not None], profile)


def _tokens(recipe: Recipe, source: Model) -> Tokens:
    named = recipe.data.tokenizer
    tokenizers = [asset.parent for asset in source.assets if asset.name.startswith("tokenizer")]
    if named is None and not tokenizers:
        raise BadInputError(f"{source.path}: the model comes without a tokenizer; name one with data.tokenizer")
    tokenizer = load_tokenizer(Path(named).expanduser() if named else tokenizers[0])
    documents = Documents(recipe.data, recipe.run_folder)
    return tokenize(documents, tokenizer, source.config.vocab_size, recipe.run_folder / "tokens")


def _plan(source: Model, recipe: Recipe, machine: Machine, free: int) -> MemoryPlan | None:
    """What the run will take of the GPU. None on a CPU and of other kernels, whose memory is not known.

    Raises BadInputError if it is more than there is.
    """
    if machine.device.type != "cuda" or machine.backend != "triton":
        return None
    plan = plan_run(source.config, recipe, machine.device)
    if verdict(plan, free) == "exceeds":
        raise BadInputError(
            f"the run needs more memory than the {free / GIB:.1f} GiB that are free on {machine.device}:\n  "
            + "\n  ".join(plan.lines())
            + f"\n{_LESS_MEMORY}"
        )
    return plan


def _capacity(moe: MoeSection) -> Capacity:
    return Capacity(factor=moe.capacity_factor, drop_policy=moe.drop_policy, pads=moe.pad_to_capacity)


def _update(recipe: Recipe, decoder: Decoder, optimizer: Optimizer) -> Update:
    coefficient = recipe.moe.aux_loss_coeff
    return Update(
        decoder,
        optimizer,
        micro_batch_size=recipe.data.micro_batch_size,
        aux_loss_coeff=decoder.config.moe_aux_loss_coeff if coefficient is None else coefficient,
        z_loss_coeff=recipe.moe.z_loss_coeff,
        bias_update_rate=recipe.moe.bias_update_rate,
        graph=recipe.kernels.graph,
        never=capture_obstacle(recipe.kernels.products) if decoder.config.num_moe_experts else None,
    )


def _profiled(recipe: Recipe, decoder: Decoder, rates: Rates, done: int, steps: int) -> ProfileWindow | None:
    """Which steps are profiled behind `done` ones, as far as the run goes; None if it ends before."""
    first = done + PROFILED_FROM
    steps = min(steps, recipe.schedule.total_steps - first + 1)
    if steps < 1:
        return None
    weight = decoder.output_weight_VH
    cost = costs(
        decoder.config,
        length=recipe.data.sequence_length,
        tokens=recipe.data.sequence_length * recipe.data.global_batch_size,
        element=weight.element_size(),
        parameters=sum(parameter.numel() for parameter in decoder.parameters()),
        moment=2 if recipe.optimizer.moments == "bf16" else 4,
    )
    return ProfileWindow(Profiler(decoder, recipe.run_folder / PROFILE, rates, cost), first, steps)


def _step(
    recipe: Recipe,
    schedule: Schedule,
    update: Update,
    throughput: Throughput,
    stream: TokenStream,
    step: int,
    is_profiled: bool,
) -> dict[str, Any]:
    """Take one step and describe it."""
    known = update.graph_sentence
    started = time.perf_counter()
    read = update.take(stream.next(recipe.data.global_batch_size), schedule.at(step), is_profiled=is_profiled)
    seconds = time.perf_counter() - started
    return {
        "step": step,
        "loss": read.loss,
        "lr": schedule.at(step),
        "grad_norm": read.grad_norm,
        "tokens": stream.consumed * stream.length,
        **throughput.record(seconds),
        "peak_memory_bytes": peak_memory_bytes(throughput.device),
        **({"graph": update.graph_sentence} if update.graph_sentence != known else {}),
        **load_summary(read, whole=_is_due(step, recipe.evaluation.every, recipe)),
    }


def _is_due(step: int, every: int, recipe: Recipe) -> bool:
    """Whether something done every so many steps, and after the last one, is done after this one."""
    return step == recipe.schedule.total_steps or bool(every and step % every == 0)


def _record(log: StepLog, record: dict[str, Any], recipe: Recipe, on_step: OnStep | None) -> None:
    written = log.write(record)
    refuse_divergence(record, recipe)
    if on_step:
        on_step(written)
