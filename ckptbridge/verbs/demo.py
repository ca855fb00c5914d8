"""`demo`: the whole story on a small real model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ckptbridge import options as o
from ckptbridge.errors import exits
from ckptbridge.flags import takes_flags


@exits
@takes_flags
def demo(
    tell: o.TellFlags,
    folder: Annotated[Path, typer.Option("--folder", help="Where everything goes.")] = Path("demo"),
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="Hub id or folder of a dense model. Default: SmolLM2-135M, installed with the demo."
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Training steps. Default: as many as fit.")
    ] = None,
    overwrite: o.Overwrite = False,
) -> None:
    """Convert a real model over and back, upcycle it, train it, export it; every number shown."""
    from ckptbridge import report
    from ckptbridge.demo.story import run_demo

    results = run_demo(
        folder,
        model=model,
        steps=steps,
        overwrite=overwrite,
        console=report.err,
        quiet=tell.silent,
        as_json=tell.as_json,
    )
    if tell.as_json:
        report.print_json(results)
    if not results["passed"]:
        raise typer.Exit(1)
