"""`launch`: the flags with which another program takes a checkpoint up."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from ckptbridge import options as o
from ckptbridge.errors import exits
from ckptbridge.flags import takes_flags

_SAVED = "Default: as saved."


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchLayoutFlags:
    """Megatron's parallel sizes; those that are not given are the ones that the checkpoint was saved for."""

    tp: Annotated[
        int | None,
        typer.Option("--tp", "--tensor-model-parallel-size", min=1, help=_SAVED, rich_help_panel=o.LAYOUT),
    ] = None
    pp: Annotated[
        int | None,
        typer.Option("--pp", "--pipeline-model-parallel-size", min=1, help=_SAVED, rich_help_panel=o.LAYOUT),
    ] = None
    vpp: Annotated[
        int | None,
        typer.Option("--vpp", "--num-virtual-stages-per-pipeline-rank", min=1, help=_SAVED, rich_help_panel=o.LAYOUT),
    ] = None
    ep: Annotated[
        int | None,
        typer.Option("--ep", "--expert-model-parallel-size", min=1, help=_SAVED, rich_help_panel=o.LAYOUT),
    ] = None
    etp: Annotated[
        int | None,
        typer.Option("--etp", "--expert-tensor-parallel-size", min=1, help=_SAVED, rich_help_panel=o.LAYOUT),
    ] = None
    first_stage_layers: Annotated[
        int | None,
        typer.Option("--decoder-first-pipeline-num-layers", min=1, help=_SAVED, rich_help_panel=o.LAYOUT),
    ] = None
    last_stage_layers: Annotated[
        int | None,
        typer.Option("--decoder-last-pipeline-num-layers", min=1, help=_SAVED, rich_help_panel=o.LAYOUT),
    ] = None


@exits
@takes_flags
def megatron(
    path: Annotated[str, typer.Argument(help="Megatron checkpoint folder.", show_default=False)],
    layout: LaunchLayoutFlags,
    tell: o.TellFlags,
    hf_config: o.HfConfig = None,
    ignore_config_field: o.IgnoreField = None,
) -> None:
    """Print the flags with which Megatron-LM's pretrain_gpt.py takes up a Megatron checkpoint.

    Together with the arguments in the checkpoint they describe the whole model, its layout and its files; those of
    the run (data, batches, learning rate) are yours. Paste them behind `torchrun ... pretrain_gpt.py`.
    """
    import shlex

    from ckptbridge import report
    from ckptbridge.converters.mcore.command import megatron_command
    from ckptbridge.converters.mcore.notes import unsaid_notes
    from ckptbridge.verbs.convert import opened, refuse

    model = opened(path, o.ReadFlags(hf_config=hf_config, ignore_config_field=ignore_config_field), "local")
    if model.saved is None:
        refuse(model, "Megatron", "hf2mcore")
    sizes = {name: size for name, size in asdict(layout).items() if size is not None}
    flags = megatron_command(model, sizes)
    notes = unsaid_notes(model.config)
    if tell.as_json:
        report.print_json({"arguments": [word for flag in flags for word in flag], "notes": notes})
        return
    typer.echo(" \\\n".join(shlex.join(flag) for flag in flags))
    if not tell.quiet:
        report.notes(tuple(notes))


launch = typer.Typer(no_args_is_help=True)
launch.command("megatron")(megatron)


@launch.callback()
def _programs() -> None:
    """Print the flags with which another program takes a checkpoint up."""
