"""Options that several verbs share, with Megatron's names and the field's short ones, in groups (see flags.py)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ckptbridge.converters.convert import ConvertOptions

LAYOUT, MEGATRON, OUTPUT, RUN = "Parallel layout", "Megatron output", "Output", "How to run"

Source = Annotated[
    str, typer.Argument(help="Checkpoint folder, or a Hub id (org/name) for Hugging Face.", show_default=False)
]
Target = Annotated[Path, typer.Argument(help="Folder to create.", show_default=False)]


class CkptFormat(StrEnum):
    torch_dist = "torch_dist"
    torch = "torch"


class ModuleNames(StrEnum):
    te = "te"
    te_sequential = "te-sequential"
    local = "local"
    oldest = "oldest"


class Quantisation(StrEnum):
    fp8_block = "fp8-block"


class Dtype(StrEnum):
    keep = "keep"
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


HfConfig = Annotated[
    Path | None, typer.Option("--hf-config", help="config.json for a Megatron checkpoint that has none beside it.")
]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub id.")]
IgnoreField = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore-config-field", help="A field of config.json that does not change the computation.", show_default=False
    ),
]


PassThrough = Annotated[
    list[str] | None,
    typer.Option(
        "--pass-through",
        metavar="PREFIX",
        help="Tensors whose names begin so are no part of the language model (vision_tower.): they go untouched to a "
        "file beside the weights, from which mcore2hf takes them back. May be given several times.",
        show_default=False,
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadFlags:
    """How a source of either side is read."""

    hf_config: HfConfig = None
    revision: Revision = None
    ignore_config_field: IgnoreField = None
    pass_through: PassThrough = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutFlags:
    """Megatron's parallel sizes."""

    tp: Annotated[int, typer.Option("--tp", "--tensor-model-parallel-size", min=1, rich_help_panel=LAYOUT)] = 1
    pp: Annotated[int, typer.Option("--pp", "--pipeline-model-parallel-size", min=1, rich_help_panel=LAYOUT)] = 1
    vpp: Annotated[
        int, typer.Option("--vpp", "--num-virtual-stages-per-pipeline-rank", min=1, rich_help_panel=LAYOUT)
    ] = 1
    ep: Annotated[int, typer.Option("--ep", "--expert-model-parallel-size", min=1, rich_help_panel=LAYOUT)] = 1
    etp: Annotated[
        int | None,
        typer.Option(
            "--etp", "--expert-tensor-parallel-size", min=1, help="Default: the TP size.", rich_help_panel=LAYOUT
        ),
    ] = None
    first_stage_layers: Annotated[
        int | None,
        typer.Option(
            "--decoder-first-pipeline-num-layers",
            min=1,
            help="Layers of the first pipeline rank; the others share the rest.",
            rich_help_panel=LAYOUT,
        ),
    ] = None
    last_stage_layers: Annotated[
        int | None,
        typer.Option(
            "--decoder-last-pipeline-num-layers",
            min=1,
            help="Layers of the last pipeline rank; the others share the rest.",
            rich_help_panel=LAYOUT,
        ),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronFlags:
    """What a Megatron checkpoint is written as."""

    ckpt_format: Annotated[
        CkptFormat,
        typer.Option(
            "--ckpt-format",
            "--format",
            help="torch_dist loads at any layout; torch (mp_rank files) at the one that is named.",
            rich_help_panel=MEGATRON,
        ),
    ] = CkptFormat.torch_dist
    names: Annotated[
        ModuleNames,
        typer.Option(
            "--module-names",
            help="Format torch: whose modules will load it. te: Transformer Engine with grouped experts; "
            "te-sequential: with separate experts; local: megatron-core's own; oldest: language_model.encoder...",
            rich_help_panel=MEGATRON,
        ),
    ] = ModuleNames.te
    target_mcore: Annotated[
        str | None,
        typer.Option(
            "--target-mcore",
            help="megatron-core version that will read it, e.g. 0.16 (common.pt) or 0.19 (common_state). "
            "Default: both.",
            rich_help_panel=MEGATRON,
        ),
    ] = None
    per_layer_keys: Annotated[
        bool,
        typer.Option(
            "--per-layer-keys",
            help="Keep layer numbers in the keys instead of stacking layers.",
            rich_help_panel=MEGATRON,
        ),
    ] = False
    for_bridge: Annotated[
        bool,
        typer.Option(
            "--for-bridge", help="Also write what Megatron-Bridge looks for: run_config.yaml.", rich_help_panel=MEGATRON
        ),
    ] = False
    max_file_size: Annotated[
        str, typer.Option("--max-file-size", help="torch_dist: size of one file.", rich_help_panel=MEGATRON)
    ] = "5GB"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFlags:
    """What is written, whatever its format."""

    dtype: Annotated[
        Dtype,
        typer.Option("--dtype", help="Dtype of the output; keep leaves each tensor's own.", rich_help_panel=OUTPUT),
    ] = Dtype.keep
    check_finite: Annotated[
        bool, typer.Option("--check-finite", help="Refuse weights that are NaN or infinite.", rich_help_panel=OUTPUT)
    ] = False
    receipt: Annotated[
        Path | None,
        typer.Option("--receipt", help="Where the receipt goes. Default: inside the target.", rich_help_panel=OUTPUT),
    ] = None


Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing target.", rich_help_panel=RUN)]
MaxShardSize = Annotated[
    str, typer.Option("--max-shard-size", help="Hugging Face output: size of one file.", rich_help_panel=OUTPUT)
]


Quantize = Annotated[
    Quantisation | None,
    typer.Option(
        "--quantize",
        help="fp8-block: linear layers in fp8 with a scale for each block of 128 x 128, as DeepSeek-V3 is published.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFlags:
    """How a conversion runs."""

    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, help="Threads. Default: the cores, at most 4.", rich_help_panel=RUN),
    ] = None
    max_ram: Annotated[str, typer.Option("--max-ram", help="Bound of the memory for tensors.", rich_help_panel=RUN)] = (
        "1GiB"
    )
    direct_io: Annotated[
        bool | None,
        typer.Option(
            "--direct-io/--page-cache",
            help="How to write. Default: past the page cache if the output would fill it and lies on a local disk.",
            rich_help_panel=RUN,
        ),
    ] = None
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped.", rich_help_panel=RUN)] = (
        False
    )
    overwrite: Overwrite = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.", rich_help_panel=RUN)] = (
        False
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TellFlags:
    """What a person or a program sees."""

    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout, nothing else.", rich_help_panel=RUN)
    ] = False
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet",
            "-q",
            help="Print errors only; a plan, a schema or launch's flags are printed all the same.",
            rich_help_panel=RUN,
        ),
    ] = False
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.", rich_help_panel=RUN)] = False

    @property
    def silent(self) -> bool:
        """Whether nothing but the result, or nothing at all, may be printed."""
        return self.as_json or self.quiet


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def nbytes(text: str, flag: str) -> int:
    """Bytes from `5GB`, `512MiB` or a number. Raises a usage error naming the flag."""
    hit = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    if hit is None or (size := int(float(hit[1]) * _UNITS[hit[2] or ""])) < 1:
        raise typer.BadParameter(f"{text!r} is no size; write 5GB or 512MiB", param_hint=flag)
    return size


def mcore_version(text: str | None) -> tuple[int, int] | None:
    """(0, 19) from `0.19.2`. Raises a usage error for anything else."""
    if text is None:
        return None
    hit = re.match(r"(\d+)\.(\d+)", text)
    if hit is None:
        raise typer.BadParameter(f"{text!r} is no version; write 0.19", param_hint="--target-mcore")
    return int(hit[1]), int(hit[2])


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertFlags:
    """Every flag that shapes what a conversion writes; `options` first, so that wrong usage shows before bad input."""

    output: OutputFlags
    run: RunFlags
    layout: LayoutFlags = field(default_factory=LayoutFlags)
    megatron: MegatronFlags = field(default_factory=MegatronFlags)
    max_shard_size: str = "5GB"
    quantize: Quantisation | None = None

    def options(self) -> ConvertOptions:
        """The converter's options. Raises a usage error for a size or version that is none."""
        import torch

        from ckptbridge.converters.convert import ConvertOptions
        from ckptbridge.converters.parallel_layout import ParallelLayout
        from ckptbridge.converters.ranks import this_rank

        dtypes = {"keep": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        layout, megatron, output, run = self.layout, self.megatron, self.output, self.run
        if megatron.names is not ModuleNames.te and megatron.ckpt_format is not CkptFormat.torch:
            raise typer.BadParameter(
                f"{megatron.names.value} goes with --format torch: torch_dist has one set of names, which all modules "
                "load",
                param_hint="--module-names",
            )
        return ConvertOptions(
            layout=ParallelLayout(
                tp=layout.tp,
                pp=layout.pp,
                vpp=layout.vpp,
                ep=layout.ep,
                etp=layout.etp,
                first_stage_layers=layout.first_stage_layers,
                last_stage_layers=layout.last_stage_layers,
            ),
            dtype=dtypes[output.dtype.value],
            per_layer_keys=megatron.per_layer_keys,
            target_mcore=mcore_version(megatron.target_mcore),
            max_file_size=nbytes(megatron.max_file_size, "--max-file-size"),
            max_shard_size=nbytes(self.max_shard_size, "--max-shard-size"),
            max_ram=nbytes(run.max_ram, "--max-ram"),
            direct_io=run.direct_io,
            resume=run.resume,
            overwrite=run.overwrite,
            receipt=output.receipt,
            check_finite=output.check_finite,
            legacy_names=megatron.names.value,
            for_bridge=megatron.for_bridge,
            quantize=None if self.quantize is None else self.quantize.value,
            rank=this_rank(),
            **({} if run.workers is None else {"workers": run.workers}),
        )
