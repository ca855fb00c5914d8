"""`hf2mcore` and `mcore2hf`: a checkpoint from one side to the other."""

from __future__ import annotations

import gc
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckptbridge import options as o
from ckptbridge.errors import exits
from ckptbridge.flags import takes_flags

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from ckptbridge.converters.convert import ConversionPlan
    from ckptbridge.converters.hub.source import Need
    from ckptbridge.converters.model import Model


@exits
@takes_flags
def hf2mcore(
    source: o.Source,
    target: o.Target,
    layout: o.LayoutFlags,
    megatron: o.MegatronFlags,
    output: o.OutputFlags,
    run: o.RunFlags,
    tell: o.TellFlags,
    revision: o.Revision = None,
    ignore_config_field: o.IgnoreField = None,
    pass_through: o.PassThrough = None,
) -> None:
    """Convert a Hugging Face checkpoint to Megatron-Core."""
    from ckptbridge.converters.convert import plan_conversion

    options = o.ConvertFlags(layout=layout, megatron=megatron, output=output, run=run).options()
    start = time.perf_counter()
    read = o.ReadFlags(revision=revision, ignore_config_field=ignore_config_field, pass_through=pass_through)
    model = opened(source, read, "plan" if run.dry_run else "stream", target)
    if model.format != "hf":
        refuse(model, "hf", "mcore2hf")
    carry_out(plan_conversion(model, target, megatron.ckpt_format.value, options), run, tell, start)


@exits
@takes_flags
def mcore2hf(
    source: o.Source,
    target: o.Target,
    output: o.OutputFlags,
    run: o.RunFlags,
    tell: o.TellFlags,
    hf_config: o.HfConfig = None,
    ignore_config_field: o.IgnoreField = None,
    max_shard_size: o.MaxShardSize = "5GB",
    quantize: o.Quantize = None,
) -> None:
    """Convert a Megatron-Core or legacy Megatron checkpoint to a Hugging Face folder."""
    from ckptbridge.converters.convert import plan_conversion

    options = o.ConvertFlags(output=output, run=run, max_shard_size=max_shard_size, quantize=quantize).options()
    start = time.perf_counter()
    model = opened(source, o.ReadFlags(hf_config=hf_config, ignore_config_field=ignore_config_field), "local")
    if model.format == "hf":
        refuse(model, "Megatron", "hf2mcore")
    carry_out(plan_conversion(model, target, "hf", options), run, tell, start)


def opened(source: str, read: o.ReadFlags, need: Need = "whole", target: Path | None = None) -> Model:
    """The checkpoint that an argument names; of a Hub id no more is fetched than is needed."""
    from ckptbridge.converters.hub.source import open_source

    return open_source(
        source,
        need,
        target=target,
        revision=read.revision,
        hf_config=read.hf_config,
        ignore_config_fields=read.ignore_config_field or (),
        pass_through=read.pass_through or (),
    )


def refuse(model: Model, wanted: str, other_verb: str) -> None:
    """Raises BadInputError for a source of the other side."""
    from ckptbridge.converters.errors import BadInputError

    raise BadInputError(
        f"{model.path}: is a {model.format} checkpoint, expected a {wanted} one; use `ckptbridge {other_verb}`"
    )


def _in_the_way(plan: ConversionPlan) -> tuple[str, ...]:
    """What makes the run itself refuse that a plan is made in spite of."""
    from ckptbridge.converters.execute import partial_folder

    options, partial = plan.options, partial_folder(plan.target)
    if plan.target.exists() and not (options.overwrite or options.resume):
        return (f"{plan.target} exists already: the run would be refused; name another folder, or add --overwrite",)
    if partial.is_dir() and any(partial.iterdir()) and not (options.overwrite or options.resume):
        return (f"{partial} is left of an earlier run: this one would be refused without --resume or --overwrite",)
    return ()


def _inode(folder: Path) -> int | None:
    """Of a folder by whose name another may be put; None if there is none."""
    return folder.stat().st_ino if folder.exists() else None


def carry_out(
    plan: ConversionPlan,
    run: o.RunFlags,
    tell: o.TellFlags,
    start: float,
    found: Callable[[], Mapping[str, Any]] | None = None,
) -> None:
    """Execute a plan, or print it, and say what was done; of several ranks the first does the talking.

    `found` is what machines are told besides, once all is done.
    """
    from ckptbridge import report
    from ckptbridge.converters.execute import execute

    gc.freeze()  # the plan lives until the end: to search its millions of objects for cycles takes seconds
    first = plan.options.rank.rank == 0
    if run.dry_run:
        if not first:
            return
        plan = replace(plan, notes=(*plan.notes, *_in_the_way(plan)))
        report.print_json(plan.to_json()) if tell.as_json else report.plan_table(plan, has_notes=not tell.quiet)
        return
    architecture, there_before = plan.source.family.architecture, _inode(plan.target)
    with report.byte_progress(f"{architecture} -> {plan.target}", hidden=tell.silent or not first) as progress:
        receipt = execute(plan, progress)
    seconds = time.perf_counter() - start
    if not first:
        return
    was_complete = there_before is not None and there_before == _inode(plan.target)
    if tell.as_json:
        summary = {k: v for k, v in plan.to_json().items() if k not in ("routes", "tensors", "estimated_seconds")}
        summary |= {"report": dict(found())} if found is not None else {}
        report.print_json({**summary, "was_complete": was_complete, "seconds": round(seconds, 3)})
    elif was_complete and not tell.quiet:
        report.out.print(
            f"{plan.target}: was complete already, by the same command; nothing was written", soft_wrap=True
        )
    elif not tell.quiet:
        report.out.print(
            f"{plan.target}: {len(receipt.source_tensors)} tensors of {architecture} written as {plan.to} "
            f"({report.size(receipt.target_nbytes)} in {seconds:.1f} s, "
            f"{report.size(receipt.target_nbytes / seconds)}/s)",
            soft_wrap=True,
        )
        report.notes(receipt.notes)
