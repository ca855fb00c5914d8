"""`diff`: two checkpoints compared tensor by tensor, with the cause where it is known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ckptbridge import options as o
from ckptbridge.errors import exits
from ckptbridge.flags import takes_flags

if TYPE_CHECKING:
    from ckptbridge.converters.diff import DiffReport


@exits
@takes_flags
def diff(
    a: Annotated[str, typer.Argument(help="Checkpoint of either side, or a Hub id.", show_default=False)],
    b: Annotated[str, typer.Argument(help="The checkpoint to compare it with.", show_default=False)],
    read: o.ReadFlags,
    tell: o.TellFlags,
) -> None:
    """Compare two checkpoints of any formats, tensor by tensor. Exit code 0 if they are one model, 1 if not."""
    from ckptbridge import report
    from ckptbridge.converters.diff import diff as compare
    from ckptbridge.verbs.convert import opened

    models = [opened(side, read) for side in (a, b)]
    with report.byte_progress("comparing", hidden=tell.silent) as progress:
        result = compare(*models, progress)
    if tell.as_json:
        report.print_json(result.to_json())
    elif not tell.quiet:
        _show(result)
    if not result.same:
        raise typer.Exit(1)


def _show(result: DiffReport) -> None:
    from ckptbridge import report
    from ckptbridge.converters.fold import folded

    if result.same:
        report.out.print(f"[green]the same[/]: {result.equal} parameters, bit for bit", soft_wrap=True)
        return
    report.out.print(
        f"[red]different[/]: {len(result.differences)} parameters differ, {result.equal} are the same", soft_wrap=True
    )
    for field in result.config:
        report.out.print(f"config {field}", soft_wrap=True)
    for side, names in (("A", result.only_a), ("B", result.only_b)):
        if names:
            report.out.print(f"only in {side}: {', '.join(folded(names)[:12])}", soft_wrap=True)
    if not result.differences:
        return
    table = report.table("parameter", "cause", "max |A - B|", "|A - B| / |A|")
    causes: dict[str, list[int]] = {}
    for i, difference in enumerate(result.differences):
        pattern = "".join(c for c in difference.name if not c.isdigit()) + difference.cause
        causes.setdefault(pattern, []).append(i)
    for rows in causes.values():
        worst = max((result.differences[i] for i in rows), key=lambda d: d.relative or 0.0)
        names = ", ".join(folded(result.differences[i].name for i in rows))
        numbers = ("" if value is None else f"{value:.2e}" for value in (worst.max_abs, worst.relative))
        table.add_row(names, worst.cause, *numbers)
    report.out.print(table)
