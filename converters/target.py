"""The folder that a conversion writes: what may be there before, what is there at the end, where its receipt goes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ckptbridge.converters.convert import ConversionPlan
from ckptbridge.converters.disk import PARTIAL_SUFFIX
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.hf_folder import INDEX, SINGLE
from ckptbridge.converters.mcore.torch_dist_reader import TRACKER
from ckptbridge.converters.output import OutputFile
from ckptbridge.converters.receipt import RECEIPT_NAME
from ckptbridge.converters.source_files import files_read


def partial_folder(target: Path) -> Path:
    """Where a target is built until it is whole."""
    return target.with_name(target.name + PARTIAL_SUFFIX)


def check_target(plan: ConversionPlan) -> None:
    """Raise BadInputError if something is there that the conversion may not replace."""
    target = plan.target
    if not target.exists():
        return
    if os.path.ismount(target):
        raise BadInputError(f"{target}: is a mount point, whose name cannot be given to another; name a folder in it")
    if not plan.options.overwrite:
        raise BadInputError(f"{target}: already exists; name another folder, or replace it with --overwrite")
    if not target.is_dir() or not is_checkpoint(target):
        raise BadInputError(f"{target}: is no checkpoint, so --overwrite does not replace it; name another folder")
    whole = target.resolve()
    for path in (*(model.path for model in plan.source.opened), *files_read(plan)):
        if any(whole in (place, *place.parents) for place in (path.absolute(), path.resolve())):
            raise BadInputError(
                f"{target}: is the source itself, or holds {path}, which is read; --overwrite would destroy it; name "
                "another folder"
            )


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is empty or holds what a checkpoint has, so that a new one may replace it."""
    marks = (RECEIPT_NAME, TRACKER, "config.json", SINGLE, INDEX, "metadata.json")
    return not any(folder.iterdir()) or any((folder / mark).exists() for mark in marks)


def check_receipt(plan: ConversionPlan) -> None:
    """Raise BadInputError for what stands in the way of a receipt elsewhere, which is written last of all."""
    receipt = plan.options.receipt
    if receipt is None or _within(receipt, plan.target) is not None:
        return
    if not receipt.parent.is_dir():
        raise BadInputError(f"--receipt {receipt}: there is no folder {receipt.parent}; make it, or name another file")
    if receipt.is_dir() or not os.access(receipt.parent, os.W_OK):
        why = "is a folder" if receipt.is_dir() else f"{receipt.parent} cannot be written to"
        raise BadInputError(f"--receipt {receipt}: {why}; name another file")


def receipt_in(plan: ConversionPlan, folder: Path) -> Path | None:
    """The receipt's place while the target is `folder`; None where it is wanted elsewhere."""
    receipt = plan.options.receipt
    inside = Path(RECEIPT_NAME) if receipt is None else _within(receipt, plan.target)
    return None if inside is None else folder / inside


def is_whole(folder: Path, file: OutputFile) -> bool:
    """Whether a file has its size; a journal or a receipt tells whether it is filled."""
    path = folder / file.name
    return path.is_file() and path.stat().st_size == file.size


def is_complete(plan: ConversionPlan, folder: Path) -> bool:
    """Whether all files of the plan are in a folder, tensors at their sizes."""
    return all(is_whole(folder, file) for file in plan.files) and all(map(os.path.isfile, _others(plan, folder)))


def _others(plan: ConversionPlan, folder: Path) -> Iterator[Path]:
    for _, name in (*plan.copies, *((made, name) for name, made in (*plan.small, *plan.reports))):
        yield folder / name


def _within(path: Path, folder: Path) -> Path | None:
    """The path from the folder to what lies in it."""
    path, folder = path.absolute(), folder.absolute()
    return path.relative_to(folder) if folder in path.parents else None
