"""`train`: run a recipe, or resume it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckptbridge import options as o
from ckptbridge.errors import exits
from ckptbridge.flags import takes_flags

if TYPE_CHECKING:
    from rich.progress import Progress


@exits
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

    checked = load_recipe(recipe, overrides or ())
    with _Bar(checked.schedule.total_steps, hidden=tell.silent) as bar:
        result = run(checked, on_step=bar.show)
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
    }
    if tell.as_json:
        report.print_json(summary)
    elif not tell.quiet:
        resumed = f" (resumed from {result.resumed_from})" if result.resumed_from else ""
        report.out.print(f"{result.steps} steps{resumed}; {result.kernels}", soft_wrap=True)
        if result.held_out_before is not None:
            report.out.print(f"held-out loss {result.held_out_before:.4f} -> {result.held_out_after:.4f} nats a token")
        for name in ("checkpoint", "hf", "log"):
            if summary[name]:
                report.out.print(f"{name}: {summary[name]}", soft_wrap=True)


class _Bar:
    """Steps, loss and speed on a terminal; nothing elsewhere (the log holds every step)."""

    def __init__(self, steps: int, hidden: bool) -> None:
        from ckptbridge import report

        self._bar: Progress | None = None
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

    def show(self, record: dict[str, Any]) -> None:
        """Show one record of the log."""
        if self._bar is None:
            return
        if "loss" in record:
            told = f"loss {record['loss']:.4f}, {record['tokens_per_s']:.0f} tokens/s"
        else:
            told = f"held-out loss {record['held_out_loss']:.4f}"
        self._bar.update(self._task, completed=record["step"], told=told)
