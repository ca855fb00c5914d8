"""`reshard`: a Megatron checkpoint for another layout, in another format, with other names."""

from __future__ import annotations

import time
from enum import StrEnum
from typing import Annotated

import typer

from ckptbridge import options as o
from ckptbridge.errors import exits
from ckptbridge.flags import takes_flags


class OptimizerFormat(StrEnum):
    keep = "keep"
    none = "none"
    fully_reshardable = "fully_reshardable"
    plain = "plain"
    distributed = "distributed"


@exits
@takes_flags
def reshard(
    source: o.Source,
    target: o.Target,
    layout: o.LayoutFlags,
    megatron: o.MegatronFlags,
    output: o.OutputFlags,
    run: o.RunFlags,
    tell: o.TellFlags,
    optimizer_format: Annotated[
        OptimizerFormat,
        typer.Option(
            "--optimizer-format",
            help="keep: what the source's is in the target's format. torch_dist holds fully_reshardable or plain "
            "ones, torch holds distributed (flat buffers) or plain ones.",
            rich_help_panel=o.MEGATRON,
        ),
    ] = OptimizerFormat.keep,
    no_optimizer: Annotated[
        bool, typer.Option("--no-optimizer", help="Carry the weights alone.", rich_help_panel=o.MEGATRON)
    ] = False,
    data_parallel_size: Annotated[
        int,
        typer.Option(
            "--data-parallel-size",
            min=1,
            help="Of the run that will load it: flat optimizer buffers are padded for it.",
            rich_help_panel=o.LAYOUT,
        ),
    ] = 1,
    hf_config: o.HfConfig = None,
    ignore_config_field: o.IgnoreField = None,
) -> None:
    """Give a Megatron checkpoint another layout, format or naming; the optimizer goes with its weights."""
    from ckptbridge.converters.reshard import plan_reshard
    from ckptbridge.verbs.convert import carry_out, opened, refuse

    if no_optimizer and optimizer_format not in (OptimizerFormat.keep, OptimizerFormat.none):
        raise typer.BadParameter("contradicts --no-optimizer", param_hint="--optimizer-format")
    options = o.ConvertFlags(layout=layout, megatron=megatron, output=output, run=run).options()
    start = time.perf_counter()
    model = opened(source, o.ReadFlags(hf_config=hf_config, ignore_config_field=ignore_config_field), "local")
    if model.format == "hf":
        refuse(model, "Megatron", "hf2mcore")
    plan = plan_reshard(
        model,
        target,
        megatron.ckpt_format.value,
        options,
        optimizer="none" if no_optimizer else optimizer_format.value,
        data_parallel_size=data_parallel_size,
    )
    carry_out(plan, run, tell, start)
