"""The flags of `upcycle`: one for each key of its recipe (trainer/upcycle_recipe.py), in groups (see flags.py).

A flag that is not given is None, so that a recipe's value counts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from ckptbridge.converters.upcycling.spec import DropMask, Method, RouterInit, RouterKind, Scaling, Shared, Split

MIXTURE, ROUTER, SHARED, EXPERTS, TEXT, DISTILL = (
    "Mixture",
    "Router",
    "Shared expert",
    "Experts that differ",
    "Text",
    "Distillation",
)

_DISTILL = "distill_"


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureFlags:
    """What the mixture is: keys of the recipe by their own names."""

    num_experts: Annotated[
        int | None,
        typer.Option("--num-experts", min=1, help="Experts of each layer.", rich_help_panel=MIXTURE),
    ] = None
    topk: Annotated[
        int | None,
        typer.Option(
            "--topk",
            "--moe-router-topk",
            min=1,
            help="Experts that a token meets. Default: 2; of a mixture what the method makes of its own.",
            rich_help_panel=MIXTURE,
        ),
    ] = None
    granularity: Annotated[
        int | None,
        typer.Option(
            "--granularity",
            "--moe-upcycling-granularity",
            min=1,
            help="Each expert has 1/G of the dense width. Default: 1.",
            rich_help_panel=MIXTURE,
        ),
    ] = None
    method: Annotated[
        Method | None,
        typer.Option(
            "--method",
            help="Default: copy for granularity 1, virtual-group above.",
            rich_help_panel=MIXTURE,
        ),
    ] = None
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            help="Class of the result (mixtral, qwen2_moe, qwen3_moe, glm4_moe...), or mcore for a Megatron-Core "
            "checkpoint. Default: the class that fits.",
            rich_help_panel=MIXTURE,
        ),
    ] = None
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers",
            help="Which layers become mixtures: all, numbers (0,2,5), ranges (4-31), a slice (3: or 1::2). "
            "Default: all.",
            rich_help_panel=MIXTURE,
        ),
    ] = None
    scaling: Annotated[
        Scaling | None,
        typer.Option(
            "--scaling",
            help="Where the factor stands that keeps the function. paper: the published cube root; down: on down_proj "
            "alone. Default: exact.",
            rich_help_panel=MIXTURE,
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option("--seed", min=0, help="Of everything that is drawn. Default: 0.", rich_help_panel=MIXTURE),
    ] = None
    allow_inexact: Annotated[
        bool | None,
        typer.Option(
            "--allow-inexact/--no-allow-inexact",
            help="Do what cannot work as meant, instead of refusing it.",
            rich_help_panel=MIXTURE,
            show_default=False,
        ),
    ] = None
    router: Annotated[
        RouterKind | None,
        typer.Option(
            "--router",
            help="How the chosen experts are weighed: so that their weights sum to one (the default), by the softmax "
            "over all experts, or by sigmoids.",
            rich_help_panel=ROUTER,
        ),
    ] = None
    router_groups: Annotated[
        bool | None,
        typer.Option(
            "--router-groups/--no-router-groups",
            help="Sigmoid: choose whole groups first, then their experts.",
            rich_help_panel=ROUTER,
            show_default=False,
        ),
    ] = None
    router_init: Annotated[
        RouterInit | None,
        typer.Option(
            "--router-init",
            help="Rows drawn at random (the default), the mean input of --prompts; of split and cmoe also "
            "representative neurons, or fitted to what each expert adds (the default where neurons are clustered).",
            rich_help_panel=ROUTER,
        ),
    ] = None
    router_std: Annotated[
        float | None,
        typer.Option(
            "--router-std",
            min=0.0,
            help="Standard deviation of the router's rows. Default: the model's own, or a wider one for groups.",
            rich_help_panel=ROUTER,
        ),
    ] = None
    router_noise: Annotated[
        float | None,
        typer.Option(
            "--router-noise",
            min=0.0,
            help="Standard deviation of what is added to each expert's row. Default: 0.",
            rich_help_panel=ROUTER,
        ),
    ] = None
    shared: Annotated[
        Shared | None,
        typer.Option(
            "--shared",
            help="An expert for every token: some of the neurons, or the whole MLP beside the others. Default: none.",
            rich_help_panel=SHARED,
        ),
    ] = None
    shared_width: Annotated[
        int | None,
        typer.Option(
            "--shared-width",
            min=0,
            help="Its neurons. Default: half of the dense width, a quarter for cmoe.",
            rich_help_panel=SHARED,
        ),
    ] = None
    shared_weight: Annotated[
        float | None,
        typer.Option(
            "--shared-weight",
            min=0.0,
            max=1.0,
            help="Its share of the output, if it overlaps. Default: 0.5.",
            rich_help_panel=SHARED,
        ),
    ] = None
    permute: Annotated[
        bool | None,
        typer.Option(
            "--permute/--no-permute",
            help="Each group cuts its shards from an order of neurons of its own.",
            rich_help_panel=EXPERTS,
            show_default=False,
        ),
    ] = None
    noise: Annotated[
        float | None,
        typer.Option(
            "--noise",
            min=0.0,
            help="Gaussian noise on the experts, as a share of each matrix's root mean square. Default: 0.",
            rich_help_panel=EXPERTS,
        ),
    ] = None
    drop_ratio: Annotated[
        float | None,
        typer.Option(
            "--drop-ratio",
            min=0.0,
            max=1.0,
            help="Method drop: the share of an expert's neurons that is drawn anew. Default: 0.5.",
            rich_help_panel=EXPERTS,
        ),
    ] = None
    drop_mask: Annotated[
        DropMask | None,
        typer.Option(
            "--drop-mask",
            help="Method drop: the same neurons in all matrices (the default), or others in each.",
            rich_help_panel=EXPERTS,
        ),
    ] = None
    split: Annotated[
        Split | None,
        typer.Option(
            "--split",
            help="Method split: which neurons go together. Default: contiguous.",
            rich_help_panel=EXPERTS,
        ),
    ] = None
    others: Annotated[
        list[Path] | None,
        typer.Option(
            "--with",
            metavar="SRC",
            help="Method branch-train-mix: a further model, whose MLPs become an expert. May be given several times.",
            rich_help_panel=EXPERTS,
            show_default=False,
        ),
    ] = None
    calibrate: Annotated[
        Path | None,
        typer.Option(
            "--calibrate",
            metavar="FILE",
            help="A text, for methods that look at activations.",
            rich_help_panel=TEXT,
        ),
    ] = None
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help="Prompts for --router-init hidden-state.", rich_help_panel=TEXT),
    ] = None
    probe: Annotated[
        Path | None,
        typer.Option(
            "--probe",
            metavar="FILE",
            help="The text that the result is compared with its source on. Default: one that comes with the program.",
            rich_help_panel=TEXT,
        ),
    ] = None
    report: Annotated[
        bool | None,
        typer.Option(
            " /--no-probe",
            help="Do not compare the result with its source.",
            rich_help_panel=TEXT,
            show_default=False,
        ),
    ] = None
    distill_tokens: Annotated[
        int | None,
        typer.Option(
            "--distill-tokens",
            min=1,
            help="Train each mixture on so many tokens to give what the dense MLP gave. Default: no training.",
            rich_help_panel=DISTILL,
        ),
    ] = None
    distill_text: Annotated[
        Path | None,
        typer.Option("--distill-text", metavar="FILE", help="Default: that of --calibrate.", rich_help_panel=DISTILL),
    ] = None
    distill_lr: Annotated[
        float | None,
        typer.Option(
            "--distill-lr", min=0.0, help="The highest learning rate. Default: 3e-3.", rich_help_panel=DISTILL
        ),
    ] = None
    distill_batch: Annotated[
        int | None,
        typer.Option("--distill-batch", min=1, help="Tokens per update. Default: 512.", rich_help_panel=DISTILL),
    ] = None

    def over(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """A recipe's values with those of the flags that were given in their place."""
        given = {flag.name: value for flag in fields(self) if (value := getattr(self, flag.name)) is not None}
        distill = {name.removeprefix(_DISTILL): given.pop(name) for name in list(given) if name.startswith(_DISTILL)}
        if distill and isinstance(known := recipe.get("distill"), dict):
            distill = {**cast(dict[str, Any], known), **distill}
        return {**recipe, **given, **({"distill": distill} if distill else {})}
