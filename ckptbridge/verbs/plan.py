"""`plan VERB ...`: what a verb would do. The same as the verb's own --dry-run."""

from __future__ import annotations

import typer

from ckptbridge.errors import exits

PLANNED = ("hf2mcore", "mcore2hf", "reshard", "upcycle")


@exits
def plan(context: typer.Context) -> None:
    """Show what hf2mcore, mcore2hf, reshard or upcycle would do with these arguments; write nothing."""
    words = _verb_first(list(context.args))
    if not words or words[0] not in PLANNED:
        verbs = "|".join(PLANNED)
        if context.args in (["--help"], ["-h"]):
            typer.echo(f"usage: ckptbridge plan {{{verbs}}} ARGUMENTS: as the verb takes them")
            return
        raise typer.BadParameter(
            f"say which verb, then its arguments: ckptbridge plan {{{verbs}}} ...", param_hint="VERB"
        )
    from ckptbridge.cli import app

    app([*words, "--dry-run"], prog_name="ckptbridge plan")


def _verb_first(words: list[str]) -> list[str]:
    """The words with flags that stand before the verb (`plan --json hf2mcore A B`) put behind it."""
    if not words or not words[0].startswith("-"):
        return words
    at = next((i for i, word in enumerate(words) if word in PLANNED), 0)
    return [*words[at : at + 1], *words[:at], *words[at + 1 :]]
