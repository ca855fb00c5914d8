"""What a person sees: progress on stderr when it is a terminal, results on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

from ckptbridge.converters.byte_sizes import size_in_words as size

if TYPE_CHECKING:
    from rich.progress import Progress

    from ckptbridge.converters.convert import ConversionPlan
    from ckptbridge.trainer.verify import VerifyReport

_PIPE_WIDTH = 240
"""Columns of a table that goes to a file or another program: names are never cut there."""

out = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
err = Console(stderr=True, highlight=False)


_JSON_ENTRIES = 10_000


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout, in parts: the plan of a model of 671 billion parameters has 60 MB."""
    for number, (name, entry) in enumerate(value.items()):
        typer.echo(f"{', ' if number else '{'}{json.dumps(name)}: ", nl=False)
        entries: list[Any] = entry if isinstance(entry, list) else []  # pyright: ignore[reportUnknownVariableType]
        if len(entries) <= _JSON_ENTRIES:
            typer.echo(json.dumps(entry), nl=False)
            continue
        for start in range(0, len(entries), _JSON_ENTRIES):
            part = json.dumps(entries[start : start + _JSON_ENTRIES])
            typer.echo(f"{', ' if start else '['}{part[1:-1]}", nl=False)
        typer.echo("]", nl=False)
    typer.echo("}" if value else "{}")


def count(parameters: int) -> str:
    """Parameters for people: 134.5M."""
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if parameters >= limit:
            return f"{parameters / limit:.4g}{unit}"
    return str(parameters)


@contextmanager
def byte_progress(label: str, hidden: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar with bytes, rate and time left, on a terminal; None elsewhere."""
    if hidden or not err.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as bar, _shown(bar):
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


_bars: list[Progress] = []
"""Those on the terminal: rich shows one at a time."""


@contextmanager
def _shown(bar: Progress) -> Iterator[None]:
    for other in _bars:
        other.stop()
    _bars.append(bar)
    try:
        yield
    finally:
        _bars.remove(bar)


@contextmanager
def layer_progress(label: str, hidden: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar that counts layers, on a terminal; None elsewhere. It takes the place of one that is still shown."""
    if hidden or not err.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}, layer"),
        MofNCompleteColumn(),
        BarColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=err, transient=True)
    with _shown(bar), bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def notes(lines: tuple[str, ...]) -> None:
    """What the user should know about a result that is right."""
    for line in lines:
        err.print(f"[yellow]note:[/] {line}", soft_wrap=True)


def nothing() -> AbstractContextManager[None]:
    """In place of a spinner where nobody looks."""
    return nullcontext()


def table(*columns: str) -> Table:
    """A plain table whose cells wrap rather than lose their ends."""
    made = Table(box=None, pad_edge=False)
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def plan_table(plan: ConversionPlan, *, has_notes: bool) -> None:
    """What a conversion would write."""
    from ckptbridge.converters.fold import folded

    info = plan.to_json()
    out.print(
        f"{info['source']} ({info['source_format']}, {plan.source.family.architecture}) -> "
        f"{info['target']} ({info['target_format']})",
        soft_wrap=True,
    )
    files = table("file", "bytes", "tensors")
    for file in plan.files:
        files.add_row(file.name, size(file.size), str(len(file.pieces)))
    out.print(files)
    if others := info["other_files"]:
        out.print(f"and {', '.join(others)}", soft_wrap=True)
    if len(by_rank := info["nbytes_by_rank"]) > 1:
        least, most = min(by_rank.values()), max(by_rank.values())
        told = size(most) if least == most else f"{size(least)} to {size(most)}"
        out.print(f"{len(by_rank)} ranks of the layout have {told} each", soft_wrap=True)
    routes = table("parameter", "Hugging Face tensors", "layout")
    groups: dict[str, list[Any]] = {}
    for move in plan.source.family.moves(plan.source.config):
        pattern = ".".join(part for part in move.name.split(".") if not part.isdigit())
        groups.setdefault(pattern, []).append(move)
    for moves in groups.values():
        sources = [", ".join(folded(move.hf[i] for move in moves)) for i in range(len(moves[0].hf))]
        routes.add_row(", ".join(folded(move.name for move in moves)), "\n".join(sources), moves[0].layout.name)
    out.print(routes)
    out.print(
        f"{info['tensors_in']} tensors in, {info['tensors_out']} out, {size(plan.nbytes)}; at most "
        f"{size(plan.peak_ram)} of memory for tensors, {plan.options.workers} workers; about "
        f"{info['estimated_seconds']:.0f} s if the disk keeps up. Nothing was written.",
        soft_wrap=True,
    )
    if has_notes:
        notes(plan.notes)


def verification(report: VerifyReport) -> None:
    """What two checkpoints compute, and where they part if they do."""
    made = table("", "A", "B")
    made.add_row("checkpoint", f"{report.a} ({report.format_a})", f"{report.b} ({report.format_b})")
    made.add_row("loss, nats a token", f"{report.loss_a:.7f}", f"{report.loss_b:.7f}")
    out.print(made)
    out.print(
        f"|difference| {report.loss_difference:.2e} (tolerance {report.tolerance:.0e}), KL {report.kl:.2e}, "
        f"max logit difference {report.max_abs_logit_difference:.2e} "
        f"({report.max_relative_logit_difference:.1e} of the largest logit), "
        f"argmax agrees on {report.argmax_agreement:.2%} of {report.tokens} tokens of {report.text}, {report.dtype}",
        soft_wrap=True,
    )
    if report.layouts:
        _layout_rows(report)
    if report.passed:
        out.print("[green]the checkpoints compute the same[/]")
        return
    if report.layouts:
        failed = [f"{row.checkpoint.upper()} under {row.layout}" for row in report.layouts if not row.passed]
        what = "the checkpoints differ" if report.first_divergence else "Megatron does not read the checkpoint as it is"
        where = f": {', '.join(failed)}" if failed else ""
        hint = "; --engine reference names the first layer that differs" if report.first_divergence else ""
        out.print(f"[red]{what}[/]{where}{hint}", soft_wrap=True)
        return
    stage = report.first_divergence or ""
    out.print(
        f"[red]the checkpoints differ[/], first at {stage} "
        f"(relative difference {report.stage_differences.get(stage, float('nan')):.2e})",
        soft_wrap=True,
    )


def _layout_rows(report: VerifyReport) -> None:
    """What megatron-core computed under each layout, and the keys that it did not find or did not want."""
    made = table("megatron-core", "loss, nats a token", "|difference|", "KL", "max logit difference", "keys", "")
    for row in report.layouts:
        wrong = {"missing": row.missing_keys, "unexpected": row.unexpected_keys}
        made.add_row(
            f"{row.checkpoint.upper()}, {row.layout}",
            f"{row.loss:.7f}",
            f"{row.loss_difference:.2e}",
            f"{row.kl:.2e}",
            f"{row.max_abs_logit_difference:.2e}",
            "\n".join(f"{kind}: {', '.join(keys)}" for kind, keys in wrong.items() if keys) or "all read",
            "[green]passed[/]" if row.passed else "[red]failed[/]",
        )
    out.print(made)
