"""Wrong usage of the program: exit code 2, and with --json an object on stdout like that of every other error."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

_UsageError: Any = typer.BadParameter.__base__
"""click's, which newer releases of typer bring along under a name of their own."""
_WORDS = "ckptbridge.words"


class Program(TyperGroup):
    """All verbs. What a person reads of wrong usage is typer's."""

    def make_context(self, info_name: Any, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Parse the words before the verb."""
        words = tuple(args)  # the parser takes them out of the list
        with _told(words):
            context = super().make_context(info_name, args, parent, **extra)
        context.meta[_WORDS] = words
        return context

    def invoke(self, ctx: Any) -> Any:
        """Parse the words behind the verb, and run it."""
        with _told(ctx.meta[_WORDS]):
            return super().invoke(ctx)


@contextmanager
def _told(words: Sequence[str]) -> Generator[None]:
    """The message of wrong usage as JSON too, where that is asked for."""
    try:
        yield
    except _UsageError as error:
        if "--json" in words:
            typer.echo(json.dumps({"error": error.format_message(), "exit_code": error.exit_code}))
        raise
