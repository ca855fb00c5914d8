"""`upcycle`: a dense checkpoint as a mixture of experts that computes the same function."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from ckptbridge import options as o
from ckptbridge.errors import exits

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
def upcycle(
    source: o.Source,
    target: o.Target,
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
    tp: o.Tp = 1,
    pp: o.Pp = 1,
    vpp: o.Vpp = 1,
    ep: o.Ep = 1,
    etp: o.Etp = None,
    hf_config: o.HfConfig = None,
    target_mcore: o.TargetMcore = None,
    per_layer_keys: o.PerLayerKeys = False,
    dtype: o.DtypeOption = o.Dtype.keep,
    max_shard_size: o.MaxShardSize = "5GB",
    max_file_size: o.MaxFileSize = "5GB",
    revision: o.Revision = None,
    ignore_config_field: o.IgnoreField = None,
    receipt: o.ReceiptFile = None,
    workers: o.Workers = None,
    max_ram: o.MaxRam = "1GiB",
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    dry_run: o.DryRun = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Turn a dense checkpoint into a mixture of experts without a jump in the loss."""
    from ckptbridge.converters.hub import local_folder
    from ckptbridge.converters.model import open_model
    from ckptbridge.converters.upcycle import UpcycleSpec, upcycled
    from ckptbridge.verbs.convert import convert

    chosen = o.convert_options(
        tp=tp,
        pp=pp,
        vpp=vpp,
        ep=ep,
        etp=etp,
        dtype=dtype,
        per_layer_keys=per_layer_keys,
        target_mcore=target_mcore,
        max_shard_size=max_shard_size,
        max_file_size=max_file_size,
        max_ram=max_ram,
        workers=workers,
        resume=resume,
        overwrite=overwrite,
        receipt=receipt,
    )
    spec = UpcycleSpec(
        num_experts=num_experts,
        topk=topk,
        granularity=granularity,
        method=method.value if method else None,
        to=None if to in (None, UpcycleTarget.mcore) else to.value,
        router_std=router_std,
        seed=seed,
    )
    dense = open_model(
        local_folder(source, revision), hf_config=hf_config, ignore_config_fields=ignore_config_field or ()
    )
    form = "torch_dist" if to == UpcycleTarget.mcore else "hf"
    convert(upcycled(dense, spec), target, form, chosen, dry_run=dry_run, as_json=as_json, quiet=quiet)
