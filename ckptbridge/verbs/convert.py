"""`hf2mcore` and `mcore2hf`: a checkpoint from one side to the other."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ckptbridge import options as o
from ckptbridge.errors import exits

if TYPE_CHECKING:
    from ckptbridge.converters.convert import ConvertOptions
    from ckptbridge.converters.model import Model


@exits
def hf2mcore(
    source: o.Source,
    target: o.Target,
    tp: o.Tp = 1,
    pp: o.Pp = 1,
    vpp: o.Vpp = 1,
    ep: o.Ep = 1,
    etp: o.Etp = None,
    ckpt_format: o.Format = o.CkptFormat.torch_dist,
    target_mcore: o.TargetMcore = None,
    per_layer_keys: o.PerLayerKeys = False,
    dtype: o.DtypeOption = o.Dtype.keep,
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
    """Convert a Hugging Face checkpoint to Megatron-Core."""
    from ckptbridge.converters.hub import local_folder
    from ckptbridge.converters.model import open_model

    chosen = o.convert_options(
        tp=tp,
        pp=pp,
        vpp=vpp,
        ep=ep,
        etp=etp,
        dtype=dtype,
        per_layer_keys=per_layer_keys,
        target_mcore=target_mcore,
        max_file_size=max_file_size,
        max_ram=max_ram,
        workers=workers,
        resume=resume,
        overwrite=overwrite,
        receipt=receipt,
    )
    model = open_model(local_folder(source, revision), ignore_config_fields=ignore_config_field or ())
    require_format(model, "hf", "mcore2hf")
    convert(model, target, "torch_dist", chosen, dry_run=dry_run, as_json=as_json, quiet=quiet)


@exits
def mcore2hf(
    source: o.Source,
    target: o.Target,
    hf_config: o.HfConfig = None,
    dtype: o.DtypeOption = o.Dtype.keep,
    max_shard_size: o.MaxShardSize = "5GB",
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
    """Convert a Megatron-Core checkpoint to a Hugging Face folder."""
    from ckptbridge.converters.model import open_model

    chosen = o.convert_options(
        dtype=dtype,
        max_shard_size=max_shard_size,
        max_ram=max_ram,
        workers=workers,
        resume=resume,
        overwrite=overwrite,
        receipt=receipt,
    )
    model = open_model(Path(source), hf_config=hf_config, ignore_config_fields=ignore_config_field or ())
    require_format(model, "torch_dist", "hf2mcore")
    convert(model, target, "hf", chosen, dry_run=dry_run, as_json=as_json, quiet=quiet)


def require_format(model: Model, wanted: str, other_verb: str) -> None:
    """Raises BadInputError when the source is of the other side."""
    from ckptbridge.converters.errors import BadInputError

    if model.format != wanted:
        raise BadInputError(f"{model.path}: is a {model.format} checkpoint; use `ckptbridge {other_verb}`")


def convert(
    model: Model,
    target: Path,
    to: Literal["hf", "torch_dist"],
    chosen: ConvertOptions,
    *,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Plan and execute a conversion, and say what was done."""
    from ckptbridge import report
    from ckptbridge.converters.convert import plan_conversion
    from ckptbridge.converters.execute import execute

    start = time.perf_counter()
    plan = plan_conversion(model, target, to, chosen)
    if dry_run:
        report.print_json(plan.to_json()) if as_json else report.plan_table(plan)
        return
    with report.byte_progress(f"{model.family.architecture} -> {target}", hidden=quiet or as_json) as progress:
        receipt = execute(plan, progress)
    seconds = time.perf_counter() - start
    if as_json:
        summary = {k: v for k, v in plan.to_json().items() if k != "routes"}
        report.print_json({**summary, "seconds": round(seconds, 3)})
    elif not quiet:
        report.out.print(
            f"{target}: {len(receipt.source_tensors)} tensors of {model.family.architecture} written as {to} "
            f"({report.size(receipt.target_nbytes)} in {seconds:.1f} s, "
            f"{report.size(receipt.target_nbytes / seconds)}/s)",
            soft_wrap=True,
        )
        report.notes(receipt.notes)
