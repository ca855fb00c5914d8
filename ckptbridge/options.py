"""Options that several verbs share, with Megatron's names and the field's short ones."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ckptbridge.converters.convert import ConvertOptions

LAYOUT, OUTPUT, RUN = "Parallel layout", "Output", "How to run"

Source = Annotated[
    str, typer.Argument(help="Checkpoint folder, or a Hub id (org/name) for Hugging Face.", show_default=False)
]
Target = Annotated[Path, typer.Argument(help="Folder to create.", show_default=False)]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub id.")]
Tp = Annotated[int, typer.Option("--tensor-model-parallel-size", "--tp", min=1, rich_help_panel=LAYOUT)]
Pp = Annotated[int, typer.Option("--pipeline-model-parallel-size", "--pp", min=1, rich_help_panel=LAYOUT)]
Vpp = Annotated[int, typer.Option("--num-virtual-stages-per-pipeline-rank", "--vpp", min=1, rich_help_panel=LAYOUT)]
Ep = Annotated[int, typer.Option("--expert-model-parallel-size", "--ep", min=1, rich_help_panel=LAYOUT)]
Etp = Annotated[
    int | None,
    typer.Option("--expert-tensor-parallel-size", "--etp", min=1, help="Default: the TP size.", rich_help_panel=LAYOUT),
]


class CkptFormat(StrEnum):
    torch_dist = "torch_dist"


class Dtype(StrEnum):
    keep = "keep"
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


Format = Annotated[
    CkptFormat, typer.Option("--ckpt-format", "--format", help="Megatron format.", rich_help_panel=OUTPUT)
]
DtypeOption = Annotated[
    Dtype, typer.Option("--dtype", help="Dtype of the output; keep leaves each tensor's own.", rich_help_panel=OUTPUT)
]
TargetMcore = Annotated[
    str | None,
    typer.Option(
        "--target-mcore",
        help="megatron-core version that will read it, e.g. 0.16 (common.pt) or 0.19 (common_state). Default: both.",
        rich_help_panel=OUTPUT,
    ),
]
PerLayerKeys = Annotated[
    bool,
    typer.Option(
        "--per-layer-keys", help="Keep layer numbers in the keys instead of stacking layers.", rich_help_panel=OUTPUT
    ),
]
MaxShardSize = Annotated[
    str, typer.Option("--max-shard-size", help="Hugging Face output: size of one file.", rich_help_panel=OUTPUT)
]
MaxFileSize = Annotated[
    str, typer.Option("--max-file-size", help="torch_dist output: size of one file.", rich_help_panel=OUTPUT)
]
ReceiptFile = Annotated[
    Path | None,
    typer.Option("--receipt", help="Where the receipt goes. Default: inside the target.", rich_help_panel=OUTPUT),
]
Workers = Annotated[
    int | None, typer.Option("--workers", min=1, help="Threads. Default: the cores, at most 4.", rich_help_panel=RUN)
]
MaxRam = Annotated[str, typer.Option("--max-ram", help="Bound of the memory for tensors.", rich_help_panel=RUN)]
Resume = Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped.", rich_help_panel=RUN)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing target.", rich_help_panel=RUN)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.", rich_help_panel=RUN)]
HfConfig = Annotated[
    Path | None, typer.Option("--hf-config", help="config.json for a Megatron checkpoint that has none beside it.")
]
IgnoreField = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore-config-field", help="A field of config.json that does not change the computation.", show_default=False
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.", rich_help_panel=RUN)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.", rich_help_panel=RUN)]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.", rich_help_panel=RUN)]

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


def convert_options(
    *,
    tp: int = 1,
    pp: int = 1,
    vpp: int = 1,
    ep: int = 1,
    etp: int | None = None,
    dtype: Dtype = Dtype.keep,
    per_layer_keys: bool = False,
    target_mcore: str | None = None,
    max_shard_size: str = "5GB",
    max_file_size: str = "5GB",
    max_ram: str = "1GiB",
    workers: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    receipt: Path | None = None,
) -> ConvertOptions:
    """The converter's options from the flags' values."""
    import torch

    from ckptbridge.converters.convert import ConvertOptions
    from ckptbridge.converters.parallel_layout import ParallelLayout

    dtypes = {"keep": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    chosen = ConvertOptions(
        layout=ParallelLayout(tp=tp, pp=pp, vpp=vpp, ep=ep, etp=etp),
        dtype=dtypes[dtype.value],
        per_layer_keys=per_layer_keys,
        target_mcore=mcore_version(target_mcore),
        max_file_size=nbytes(max_file_size, "--max-file-size"),
        max_shard_size=nbytes(max_shard_size, "--max-shard-size"),
        max_ram=nbytes(max_ram, "--max-ram"),
        resume=resume,
        overwrite=overwrite,
        receipt=receipt,
        **({} if workers is None else {"workers": workers}),
    )
    return chosen
