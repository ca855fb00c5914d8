"""How a verb ends: the exit codes of the command line, and one sentence where a traceback would help nobody."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from typing import NoReturn, ParamSpec

import typer

P = ParamSpec("P")

INTERRUPTED = 130
UNREAD = 141
"""Nobody read what was printed: what a shell says of a program that SIGPIPE ended, and no success of a verification."""
INTERNAL_ERROR = 70
"""BSD's EX_SOFTWARE: a defect of this program, never to be taken for a verification that failed."""


def exits(verb: Callable[P, None], *, interrupted: str | None = None) -> Callable[P, None]:
    """Turn a verb's exceptions into exit codes and messages; `--debug` shows the traceback instead.

    `interrupted` is what a user is told who stopped the verb, by default how to go on if it has --resume.
    """

    @functools.wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        if kwargs.get("debug"):
            verb(*args, **kwargs)
            return
        try:
            verb(*args, **kwargs)
        except (typer.Exit, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            resumes = "; what was written is kept: run again with --resume" if "resume" in kwargs else ""
            _leave(interrupted or f"interrupted{resumes}", INTERRUPTED, kwargs)
        except BrokenPipeError:
            _forget_stdout()
            raise typer.Exit(UNREAD) from None
        except Exception as error:
            from ckptbridge.converters.errors import CkptBridgeError

            if isinstance(error, CkptBridgeError):
                _leave(str(error), error.exit_code, kwargs)
            if isinstance(error, OSError):
                _leave(f"{error.filename or ''}: {error.strerror or error}", 4, kwargs)
            told = (
                f"{type(error).__name__}: {error}\nThis is a defect of ckptbridge. Run again with --debug and report it"
            )
            _leave(told, INTERNAL_ERROR, kwargs)

    return run


def _forget_stdout() -> None:
    """The reader of our output left (`| head`): Python would complain again while closing stdout."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _leave(message: str, code: int, options: dict[str, object]) -> NoReturn:
    if options.get("as_json"):
        try:
            typer.echo(json.dumps({"error": message, "exit_code": code}))
        except BrokenPipeError:
            _forget_stdout()
    typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
    typer.echo(message, err=True)
    raise typer.Exit(code)
