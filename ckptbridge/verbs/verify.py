"""`verify`: two checkpoints compared by what they compute."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from xml.etree import ElementTree

import typer

from ckptbridge import options as o
from ckptbridge.errors import exits
from ckptbridge.flags import takes_flags

if TYPE_CHECKING:
    from ckptbridge.converters.parallel_layout import ParallelLayout
    from ckptbridge.trainer.verify import VerifyReport


class VerifyDtype(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"


class Engine(StrEnum):
    reference = "reference"
    megatron = "megatron"


@exits
@takes_flags
def verify(
    tell: o.TellFlags,
    a: Annotated[str, typer.Argument(help="Checkpoint of either side, or a Hub id.", show_default=False)],
    b: Annotated[str | None, typer.Argument(help="The checkpoint to compare it with.", show_default=False)] = None,
    against_receipt: Annotated[
        Path | None,
        typer.Option(
            "--against-receipt",
            help="In place of B: the receipt of the conversion that wrote or read A. Checks every tensor's digest.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", help="Text to predict. Default: one that comes with the program.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="How many of its tokens.")] = 1024,
    dtype: Annotated[VerifyDtype, typer.Option("--dtype", help="Dtype of the computation.")] = VerifyDtype.fp32,
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", min=0.0, help="Nats a token. Default: 1e-5 in fp32, 5e-3 in bf16."),
    ] = None,
    engine: Annotated[
        Engine,
        typer.Option(
            "--engine", help="What computes Megatron checkpoints: this program, or megatron-core itself, on the CPU."
        ),
    ] = Engine.reference,
    layouts: Annotated[
        str | None,
        typer.Option(
            "--layouts",
            help="Layouts under which megatron-core loads them, e.g. tp2,ep2,pp2ep2. Default: one rank. "
            "As in Megatron, etp is the TP size unless it is named (tp2ep2etp1).",
            show_default=False,
        ),
    ] = None,
    hf_config: o.HfConfig = None,
    revision: o.Revision = None,
    pass_through: o.PassThrough = None,
    junit: Annotated[Path | None, typer.Option("--junit", help="Also write the result as JUnit XML.")] = None,
) -> None:
    """Compare the losses of two checkpoints on a text. Exit code 0 if they agree, 1 if not."""
    if b is None and against_receipt is not None:
        from ckptbridge.verbs.recheck import verify_against_receipt

        read = o.ReadFlags(hf_config=hf_config, revision=revision, pass_through=pass_through)
        verify_against_receipt(a, against_receipt, read, tell)
        return
    if b is None or against_receipt is not None:
        raise typer.BadParameter("name two checkpoints, or one with --against-receipt", param_hint="B")
    if pass_through:
        raise typer.BadParameter(
            "goes with --against-receipt: what stands beside a language model is not computed; diff compares its bytes",
            param_hint="--pass-through",
        )
    import torch

    from ckptbridge import report
    from ckptbridge.converters.errors import BadInputError
    from ckptbridge.converters.hub.source import local_folder
    from ckptbridge.trainer.verify import verify as compare

    chosen = _layouts(layouts, engine)
    if text is not None and not text.is_file():
        raise BadInputError(f"{text}: no such text file")
    with report.err.status("computing both losses") if not tell.silent else report.nothing():
        result = compare(
            local_folder(a, revision),
            local_folder(b, revision),
            text=text.read_text(encoding="utf-8", errors="replace") if text else None,
            tokens=tokens,
            dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype.value],
            tolerance=tolerance,
            hf_config=hf_config,
            engine=engine.value,
            layouts=chosen,
        )
    if junit is not None:
        junit.write_bytes(junit_xml(a, b, result))
    if tell.as_json:
        report.print_json(result.to_json())
    elif not tell.quiet:
        report.verification(result)
    if not result.passed:
        raise typer.Exit(1)


def _layouts(text: str | None, engine: Engine) -> list[ParallelLayout]:
    """The layouts named. Raises a usage error for what is none, and for any without --engine megatron."""
    from ckptbridge.converters.errors import BadInputError
    from ckptbridge.trainer.megatron.layouts import parse_layouts

    if text is None:
        return []
    if engine is not Engine.megatron:
        raise typer.BadParameter(
            "layouts need --engine megatron: the reference engine is one process", param_hint="--layouts"
        )
    try:
        return parse_layouts(text)
    except BadInputError as error:
        raise typer.BadParameter(str(error), param_hint="--layouts") from error


def junit_xml(a: str, b: str, result: VerifyReport) -> bytes:
    """One test case, failed with the numbers if the checkpoints disagree."""
    failures = "0" if result.passed else "1"
    suite = ElementTree.Element("testsuite", name="ckptbridge verify", tests="1", failures=failures)
    case = ElementTree.SubElement(suite, "testcase", classname="ckptbridge.verify", name=f"{a} = {b}")
    if not result.passed:
        failure = ElementTree.SubElement(case, "failure", message="the checkpoints compute different losses")
        failure.text = str(result.to_json())
    return ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)
