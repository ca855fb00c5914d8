"""`upcycle`: a dense checkpoint as a mixture of experts that computes the same function."""

from __future__ import annotations

import time
from enum import StrEnum
from typing import Annotated

import typer

from ckptbridge import options as o
from ckptbridge.errors import exits
from ckptbridge.flags import takes_flags

MIXTURE = "Mixture"


class UpcycleMethod(StrEnum):
    copy = "copy"
    virtual_group = "virtual-group"


class UpcycleTarget(StrEnum):
    mixtral = "mixtral"
    qwen2_moe = "qwen2_moe"
    qwen3_moe = "qwen3_moe"
    mcore = "mcore"


@exits
@takes_flags
def upcycle(
    source: o.Source,
    target: o.Target,
    read: o.ReadFlags,
    layout: o.LayoutFlags,
    megatron: o.MegatronFlags,
    output: o.OutputFlags,
    run: o.RunFlags,
    tell: o.TellFlags,
    num_experts: Annotated[
        int, typer.Option("--num-experts", min=1, help="Experts of each layer.", rich_help_panel=MIXTURE)
    ],
    topk: Annotated[
        int,
        typer.Option("--topk", "--moe-router-topk", min=1, help="Experts that a token meets.", rich_help_panel=MIXTURE),
    ] = 2,
    granularity: Annotated[
        int,
        typer.Option(
            "--granularity",
            "--moe-upcycling-granularity",
            min=1,
            help="Each expert has 1/G of the dense width.",
            rich_help_panel=MIXTURE,
        ),
    ] = 1,
    method: Annotated[
        UpcycleMethod | None,
        typer.Option("--method", help="Default: copy for granularity 1, virtual-group above.", rich_help_panel=MIXTURE),
    ] = None,
    to: Annotated[
        UpcycleTarget | None,
        typer.Option(
            "--to",
            help="Class of the result, or mcore for a Megatron-Core checkpoint. Default: the class that fits.",
            rich_help_panel=MIXTURE,
        ),
    ] = None,
    router_std: Annotated[
        float | None,
        typer.Option(
            "--router-std",
            min=0.0,
            help="Standard deviation of the router. Default: the model's own.",
            rich_help_panel=MIXTURE,
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the router's rows.", rich_help_panel=MIXTURE)] = 0,
    max_shard_size: o.MaxShardSize = "5GB",
) -> None:
    """Turn a dense checkpoint into a mixture of experts without a jump in the loss."""
    from ckptbridge.converters.convert import plan_conversion
    from ckptbridge.converters.upcycling.construction import upcycled
    from ckptbridge.converters.upcycling.spec import UpcycleSpec
    from ckptbridge.verbs.convert import carry_out, opened

    start = time.perf_counter()
    flags = o.ConvertFlags(layout=layout, megatron=megatron, output=output, run=run, max_shard_size=max_shard_size)
    options = flags.options()
    spec = UpcycleSpec(
        num_experts=num_experts,
        topk=topk,
        granularity=granularity,
        method=method.value if method else None,
        to=None if to in (None, UpcycleTarget.mcore) else to.value,
        router_std=router_std,
        seed=seed,
    )
    form = megatron.ckpt_format.value if to == UpcycleTarget.mcore else "hf"
    model = upcycled(opened(source, read), spec)
    carry_out(plan_conversion(model, target, form, options), run, tell, start)
