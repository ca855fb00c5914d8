"""`upcycle`: a dense checkpoint as a mixture of experts that computes the same function, where that can be."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ckptbridge import options as o
from ckptbridge.errors import exits
from ckptbridge.flags import takes_flags
from ckptbridge.mixture_flags import MIXTURE, MixtureFlags

if TYPE_CHECKING:
    from ckptbridge.converters.convert import ConversionPlan
    from ckptbridge.trainer.upcycle_recipe import UpcycleSection


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
    mixture: MixtureFlags,
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe",
            metavar="FILE",
            help="YAML file with the keys num_experts, topk, method...: as the flags, which count more.",
            rich_help_panel=MIXTURE,
        ),
    ] = None,
    max_shard_size: o.MaxShardSize = "5GB",
) -> None:
    """Make a mixture of experts of a dense model (or of a mixture a larger or smaller one), exactly where it can be."""
    from ckptbridge import report

    start = time.perf_counter()
    flags = o.ConvertFlags(layout=layout, megatron=megatron, output=output, run=run, max_shard_size=max_shard_size)
    options = flags.options()
    section = section_of(recipe, mixture)
    from ckptbridge.converters.convert import checked_target, plan_conversion
    from ckptbridge.converters.errors import BadInputError
    from ckptbridge.trainer.upcycle_recipe import MCORE
    from ckptbridge.trainer.upcycling.outline import outlined
    from ckptbridge.trainer.upcycling.prepared import prepared_of
    from ckptbridge.trainer.upcycling.report import REPORT_FILE
    from ckptbridge.trainer.upcycling.scratch import check_scratch, remove_scratch
    from ckptbridge.verbs.convert import carry_out, opened
    from ckptbridge.verbs.upcycle_report import Reporter, probe_of

    # Whatever can be refused is refused before anything is measured or trained.
    target = checked_target(target, options)
    if target.exists() and not (run.overwrite or run.dry_run):
        raise BadInputError(f"{target}: already exists; name another folder, or replace it with --overwrite")
    work = target.with_name(target.name + ".distilled")
    if section.distill is not None and not run.dry_run:
        check_scratch(work)
    form = megatron.ckpt_format.value if section.to == MCORE else "hf"
    model = opened(source, read)
    if section.to is None and model.config.num_moe_experts is None:
        section = section.model_copy(update={"to": "hf"})
    if section.distill is not None and options.rank.world_size > 1:
        raise typer.BadParameter("distillation runs in one process", param_hint="--distill-tokens")
    outline = outlined(model, section)
    has_report = section.report and not run.dry_run
    probe = probe_of((*outline.sources, outline.mixture), section.probe) if has_report else None
    if section.calibrate or section.prompts or section.distill:
        check_plan(plan_conversion(outline.mixture, target, form, options), run)
    with report.layer_progress("running the source", hidden=tell.silent) as progress:
        made = prepared_of(outline, section, None if run.dry_run else work, progress)
    reporter = None if probe is None else Reporter(made, probe, options.dtype, hidden=tell.silent)
    plan = plan_conversion(made.mixture, target, form, options)
    if reporter is not None:
        plan = replace(plan, reports=((REPORT_FILE, reporter.file),))
    carry_out(plan, run, tell, start, reporter.to_json if reporter else None)
    if made.distilled:
        remove_scratch(work)
    if reporter is None or reporter.found is None:
        return
    if not tell.silent:
        for line in reporter.lines():
            report.out.print(line, markup=False, soft_wrap=True)
    if reporter.failed:
        raise typer.Exit(1)


def check_plan(plan: ConversionPlan, run: o.RunFlags) -> None:
    """Raise BadInputError for what stands in the way of a plan's target, before the work that comes ahead of it."""
    from ckptbridge.converters.errors import BadInputError
    from ckptbridge.converters.target import check_receipt, check_target, partial_folder

    if run.dry_run or plan.options.rank.rank:  # the first rank looks for all, and may have begun already
        return
    check_target(plan)
    check_receipt(plan)
    partial = partial_folder(plan.target)
    if partial.is_dir() and any(partial.iterdir()) and not (run.resume or run.overwrite):
        raise BadInputError(
            f"{partial}: is left of an earlier run; continue it with --resume, or begin anew with --overwrite"
        )


def section_of(recipe: Path | None, mixture: MixtureFlags) -> UpcycleSection:
    """The recipe with the flags in place of what it says, checked.

    Raises a usage error without a number of experts, BadInputError naming every key that is wrong.
    """
    from ckptbridge.trainer.recipe_file import parse_section, read_values
    from ckptbridge.trainer.upcycle_recipe import UpcycleSection

    values = mixture.over({} if recipe is None else read_values(recipe))
    if recipe is None and mixture.num_experts is None:
        raise typer.BadParameter("say how many experts, or name a --recipe", param_hint="--num-experts")
    return parse_section(UpcycleSection, values, "the flags" if recipe is None else str(recipe))
