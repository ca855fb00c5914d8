"""`train`: run a recipe, or resume it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckptbridge import options as o
from ckptbridge.errors import exits
from ckptbridge.flags import takes_flags

if TYPE_CHECKING:
    from rich.progress import Progress

    from ckptbridge.trainer.recipe import Recipe


_INTERRUPTED = (
    "interrupted: the same command resumes from the run folder's newest checkpoint, or begins anew where there is none "
    "(checkpoint.save_every)"
)


@functools.partial(exits, interrupted=_INTERRUPTED)
@takes_flags
def train(
    tell: o.TellFlags,
    recipe: Annotated[
        Path | None, typer.Argument(help="YAML file of the run. The same recipe again resumes it.", show_default=False)
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a value, such as optimizer.lr=3e-5. May be given several times."),
    ] = None,
    no_graph: Annotated[
        bool, typer.Option("--no-graph", help="Launch every operation by itself; the same as kernels.graph=off.")
    ] = False,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Print what the run will take of a GPU's memory, and stop; writes nothing."),
    ] = False,
    profile: Annotated[
        int,
        typer.Option(
            "--profile",
            metavar="N",
            min=0,
            help="Profile N steps behind the first two: a trace for Perfetto and a table of where a step goes.",
        ),
    ] = 0,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the recipe's JSON schema for editors, and stop.")
    ] = False,
) -> None:
    """Train a model from a recipe; checkpoints are Megatron-Core's, the result a Hugging Face folder."""
    from ckptbridge import report
    from ckptbridge.trainer.recipe import json_schema

    if schema:
        report.print_json(json_schema())
        return
    if recipe is None:
        raise typer.BadParameter("name the YAML file of the run", param_hint="RECIPE")
    from ckptbridge.trainer.loop import train as run
    from ckptbridge.trainer.recipe_file import load_recipe

    checked = load_recipe(recipe, [*(overrides or ()), *(["kernels.graph=off"] if no_graph else [])])
    if plan:
        _show_plan(checked, tell)
        return
    with _Bar(checked.schedule.total_steps, hidden=tell.silent) as bar:
        result = run(checked, on_step=bar.show, on_note=bar.note, profiled_steps=profile)
    summary = {
        "run_folder": str(checked.run_folder),
        "steps": result.steps,
        "resumed_from": result.resumed_from,
        "held_out_before": result.held_out_before,
        "held_out_after": result.held_out_after,
        "checkpoint": str(result.checkpoint),
        "hf": str(result.hf) if result.hf else None,
        "log": str(result.log),
        "kernels": result.kernels,
        "notes": list(result.notes),
        "profile": result.profile.to_json() if result.profile else None,
    }
    if tell.as_json:
        report.print_json(summary)
    elif not tell.quiet:
        resumed = f" (resumed from {result.resumed_from})" if result.resumed_from else ""
        report.out.print(f"{result.steps} steps{resumed}; {result.kernels}", soft_wrap=True)
        if result.held_out_before is not None:
            report.out.print(f"held-out loss {result.held_out_before:.4f} -> {result.held_out_after:.4f} nats a token")
        for note in result.notes:
            if note not in bar.noted:
                report.out.print(note, soft_wrap=True, markup=False)
        if result.profile:
            for line in result.profile.lines():
                report.out.print(line, soft_wrap=True, highlight=False)
            report.out.print(f"trace: {result.profile.trace}", soft_wrap=True)
        for name in ("checkpoint", "hf", "log"):
            if summary[name]:
                report.out.print(f"{name}: {summary[name]}", soft_wrap=True)


def _show_plan(recipe: Recipe, tell: o.TellFlags) -> None:
    from ckptbridge import report
    from ckptbridge.trainer.memory_plan import plan_run
    from ckptbridge.trainer.planned_source import planned_config
    from ckptbridge.trainer.run_notes import kernels_of_plan, notes_of

    config = planned_config(recipe.model)
    planned = plan_run(config, recipe)
    notes = [kernels_of_plan(recipe.kernels), *notes_of(recipe, config)]
    if tell.as_json:
        report.print_json(planned.to_json() | {"notes": notes})
        return
    for line in planned.lines():
        report.out.print(line, highlight=False)
    for note in notes:
        report.out.print(note, soft_wrap=True, highlight=False, markup=False)


class _Bar:
    """Steps, loss and speed on a terminal; nothing elsewhere (the log holds every step)."""

    def __init__(self, steps: int, hidden: bool) -> None:
        from ckptbridge import report

        self._bar: Progress | None = None
        self._hidden, self._console = hidden, report.err
        self.noted: list[str] = []
        """What was said before the first step."""
        if not hidden and report.err.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[told]}"),
            )
            self._bar = Progress(*columns, console=report.err, transient=True)
            self._task = self._bar.add_task("", total=steps, told="loading")

    def __enter__(self) -> _Bar:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def note(self, sentence: str) -> None:
        """Say what a user should know before the run has cost anything."""
        self.noted.append(sentence)
        if not self._hidden:
            self._console.print(f"note: {sentence}", soft_wrap=True, highlight=False, markup=False)

    def show(self, record: dict[str, Any]) -> None:
        """Show one record of the log."""
        if self._bar is None:
            return
        line = told(record) if "loss" in record else f"held-out loss {record['held_out_loss']:.4f}"
        self._bar.update(self._task, completed=record["step"], told=line)


def told(record: dict[str, Any]) -> str:
    """A step on one line: what the device can tell stands in the record."""
    parts = [f"loss {record['loss']:.4f}", f"{record['tokens_per_s']:.0f} tokens/s"]
    if "tflops" in record:
        parts.append(f"{record['tflops']:.0f} TFLOP/s")
    if "mfu" in record:
        parts.append(f"MFU {record['mfu']:.1%}")
    return ", ".join([*parts, f"{record['peak_memory_bytes'] / 2**30:.1f} GiB"])
