"""`verify PATH --against-receipt FILE`: every tensor's digest again, against the receipt of its conversion."""

from __future__ import annotations

from pathlib import Path

import typer

from ckptbridge import options as o


def verify_against_receipt(source: str, receipt: Path, read: o.ReadFlags, tell: o.TellFlags) -> None:
    """Print what changed since the receipt was written. Exit code 0 if nothing did, 1 if something did."""
    from ckptbridge import report
    from ckptbridge.converters.fold import folded
    from ckptbridge.converters.receipt import read_receipt
    from ckptbridge.converters.recheck import recheck
    from ckptbridge.verbs.convert import opened

    model = opened(source, read)
    with report.byte_progress("checking digests", hidden=tell.silent) as progress:
        result = recheck(model, read_receipt(receipt), progress=progress)
    if tell.as_json:
        report.print_json(result.to_json())
    elif not tell.quiet:
        told = f"{result.checked} tensors of {result.folder}, the {result.side} of the conversion"
        report.out.print(
            f"[green]unchanged[/]: {told}" if result.passed else f"[red]changed[/]: {told}", soft_wrap=True
        )
        for what in ("changed", "missing", "unknown"):
            if names := getattr(result, what):
                report.out.print(f"{what}: {', '.join(folded(names)[:12])}", soft_wrap=True)
    if not result.passed:
        raise typer.Exit(1)
