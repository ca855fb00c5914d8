"""The command line: one program, a verb a job. Each verb parses, calls the rooms, and reports."""

from __future__ import annotations

from typing import Annotated

import typer

from ckptbridge import __version__
from ckptbridge.usage import Program
from ckptbridge.verbs.convert import hf2mcore, mcore2hf
from ckptbridge.verbs.demo import demo
from ckptbridge.verbs.diff import diff
from ckptbridge.verbs.inspect import inspect
from ckptbridge.verbs.launch import launch
from ckptbridge.verbs.plan import plan
from ckptbridge.verbs.reshard import reshard
from ckptbridge.verbs.train import train
from ckptbridge.verbs.upcycle import upcycle
from ckptbridge.verbs.verify import verify

app = typer.Typer(
    name="ckptbridge",
    cls=Program,
    help="Carry large language models between Hugging Face and Megatron: convert, upcycle, verify, train.",
    epilog="Exit codes: 0 done, 1 verification failed, 2 wrong usage, 3 bad input, 4 disk or network, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ckptbridge {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Carry large language models between Hugging Face and Megatron: convert, upcycle, verify, train."""


for verb in (hf2mcore, mcore2hf, reshard, upcycle, verify, inspect, diff, train, demo):
    app.command()(verb)
app.add_typer(launch, name="launch")
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})(plan)
