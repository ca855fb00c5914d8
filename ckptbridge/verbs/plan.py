"""`plan VERB ...`: what a verb would do. The same as the verb's own --dry-run."""

from __future__ import annotations

import typer

from ckptbridge.errors import exits

PLANNED = ("hf2mcore", "mcore2hf", "reshard", "upcycle")


@exits
def plan(context: typer.Context) -> None:
    """Show what hf2mcore, mcore2hf, reshard or upcycle would do with these arguments; write nothing."""
    words = list(context.args)
    if not words or words[0] not in PLANNED:
        typer.echo(f"usage: ckptbridge plan {{{'|'.join(PLANNED)}}} ARGUMENTS: as the verb takes them", err=True)
        raise typer.Exit(0 if words in (["--help"], ["-h"]) else 2)
    from ckptbridge.cli import app

    app([*words, "--dry-run"], prog_name="ckptbridge plan")
