"""Carrying out a plan: whole or not at all, and resumable.

A folder under its own name is complete; `.partial` beside it is work in progress, and `.partial.journal` tells which
of its files are finished. The journal is bound to the plan: it is refused when the source or an option has changed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ckptbridge.converters.convert import ConversionPlan
from ckptbridge.converters.copying import (
    PARTIAL_SUFFIX,
    Copier,
    Progress,
    digest_of,
    disk_message,
    sync_folder,
    take_name,
    write_file,
)
from ckptbridge.converters.errors import BadInputError, StorageError
from ckptbridge.converters.hf_folder import INDEX, SINGLE
from ckptbridge.converters.mcore.torch_dist_reader import TRACKER
from ckptbridge.converters.output import OutputFile
from ckptbridge.converters.receipt import RECEIPT_NAME, Receipt
from ckptbridge.converters.tensors import Checkpoint, Extent

_FINISHED = json.dumps({"plan": "finished"})
"""The journal's first line once only names are left to change: the folder is not to be resumed then."""


def partial_folder(target: Path) -> Path:
    """Where a target is built until it is whole."""
    return target.with_name(target.name + PARTIAL_SUFFIX)


def journal_file(target: Path) -> Path:
    """Beside the partial folder, so that the folder holds nothing but the output, and is known as ours to the end."""
    return target.with_name(target.name + PARTIAL_SUFFIX + ".journal")


def execute(plan: ConversionPlan, progress: Progress | None = None) -> Receipt:
    """Write what the plan says. Returns the receipt, which also lies in the target.

    Raises BadInputError when the target exists or an input turns out broken, StorageError when the disk fails.
    """
    partial = partial_folder(plan.target)
    try:
        return _execute(plan, partial, progress)
    except OSError as error:
        raise StorageError(disk_message(Path(error.filename or partial), error)) from error


def _execute(plan: ConversionPlan, partial: Path, progress: Progress | None) -> Receipt:
    options = plan.options
    _prepare(plan, partial)
    _check_space(plan, partial)
    copier = Copier(partial, workers=options.workers, max_ram=options.max_ram, progress=progress, total=plan.nbytes)
    digests = _write_files(plan, partial, copier)
    for source, name in plan.copies:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        write_file(partial / name, source.read_bytes())
    for name, data in plan.small:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        write_file(partial / name, data)
    receipt = _receipt(plan, digests, copier.workers)
    write_file(options.receipt or partial / RECEIPT_NAME, receipt.to_json().encode())
    for folder in (*{(partial / file.name).parent for file in plan.files}, partial):
        sync_folder(folder)
    journal = journal_file(plan.target)
    write_file(journal, f"{_FINISHED}\n".encode())
    take_name(partial, plan.target)
    journal.unlink()
    return receipt


def _prepare(plan: ConversionPlan, partial: Path) -> None:
    """Make the partial folder with its journal, or find the one to resume."""
    _check_target(plan)
    first, journal = json.dumps({"plan": plan_fingerprint(plan)}), journal_file(plan.target)
    if partial.exists() and any(partial.iterdir()):
        if not journal.exists():
            raise BadInputError(
                f"{partial}: is no unfinished conversion, so it is left alone; remove it, or name another target"
            )
        begun = journal.read_text(errors="replace").partition("\n")[0]
        if plan.options.resume and begun == first:
            return
        if plan.options.resume and begun != _FINISHED:
            raise BadInputError(
                f"{partial}: was begun from another source or with other options; remove it, or run without --resume "
                "and with --overwrite"
            )
        if not (plan.options.resume or plan.options.overwrite):
            raise BadInputError(
                f"{partial}: an earlier run did not finish; continue it with --resume, or begin anew with --overwrite"
            )
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    write_file(journal, f"{first}\n".encode())
    partial.mkdir()


def _check_target(plan: ConversionPlan) -> None:
    target, source = plan.target, plan.source.path.resolve()
    if not target.exists():
        return
    if not plan.options.overwrite:
        raise BadInputError(f"{target}: already exists; name another folder, or replace it with --overwrite")
    if not target.is_dir() or not _is_checkpoint(target):
        raise BadInputError(f"{target}: is no checkpoint, so --overwrite does not replace it; name another folder")
    if target.resolve() == source or target.resolve() in source.parents:
        raise BadInputError(f"{target}: is the source itself, which --overwrite would destroy; name another folder")


def _is_checkpoint(folder: Path) -> bool:
    marks = (RECEIPT_NAME, TRACKER, "config.json", SINGLE, INDEX, "metadata.json")
    return not any(folder.iterdir()) or any((folder / mark).exists() for mark in marks)


def _check_space(plan: ConversionPlan, partial: Path) -> None:
    present = sum(p.stat().st_size for p in partial.rglob("*") if p.is_file())
    need = sum(file.size for file in plan.files) - present
    free = shutil.disk_usage(partial).free
    if need > free:
        raise StorageError(
            f"{partial}: the disk has {free / 1e9:.2f} GB free, {need / 1e9:.2f} GB are needed; no tensor was written. "
            "Free some space and run again with --resume, or name a folder on another disk"
        )


def _write_files(plan: ConversionPlan, partial: Path, copier: Copier) -> dict[str, str]:
    """Write what is not finished yet; a line of the journal follows each file. Digests are in the plan's order."""
    finished = _finished(plan, partial)
    digests: dict[str, str] = {}
    for file in plan.files:
        if file.name in finished:
            copier.advance(file.tensor_nbytes)
            digests.update(finished[file.name])
            continue
        written = copier.write(file)
        digests.update(written)
        with journal_file(plan.target).open("a") as out:
            out.write(json.dumps({"file": file.name, "digests": written}) + "\n")
    return digests


def _finished(plan: ConversionPlan, partial: Path) -> dict[str, dict[str, str]]:
    """{file: digests} of the files that are whole. A line that was torn by a crash ends the journal, and is cut off."""
    journal = journal_file(plan.target)
    lines = journal.read_text(errors="replace").split("\n")
    names = {file.name: {piece.name for piece in file.pieces} for file in plan.files}
    sizes = {file.name: file.size for file in plan.files}
    kept, found = [lines[0]], dict[str, dict[str, str]]()
    for line in lines[1:]:
        try:
            entry = json.loads(line)
            name, digests = entry["file"], entry["digests"]
        except (ValueError, TypeError, KeyError):
            break
        kept.append(line)
        path = partial / name
        if names.get(name) == digests.keys() and path.is_file() and path.stat().st_size == sizes[name]:
            found[name] = {piece: digests[piece] for piece in digests}
    write_file(journal, ("\n".join(kept) + "\n").encode())
    return found


def _receipt(plan: ConversionPlan, digests: Mapping[str, str], workers: int) -> Receipt:
    return Receipt(
        source=str(plan.source.path),
        source_format=plan.source.format,
        target_format=plan.to,
        family=plan.source.family.name,
        notes=plan.notes,
        source_tensors=_source_digests(plan.source.sources, plan.files, digests, workers),
        target_tensors=dict(digests),
        source_nbytes=sum(tensor.nbytes for tensor in plan.source.sources.values()),
        target_nbytes=plan.nbytes,
        files={file.name: file.size for file in plan.files},
    )


def _source_digests(
    sources: Checkpoint, files: Iterable[OutputFile], digests: Mapping[str, str], workers: int
) -> dict[str, str]:
    """A digest of every source tensor. One that was moved whole has its digest already; only others are read again."""
    moved: dict[tuple[Extent, ...], str] = {}
    for file in files:
        for piece in file.pieces:
            if (extents := piece.tensor.extents()) is not None and len(extents) == 1:
                moved[tuple(extents)] = digests[piece.name]
    known = {name: moved.get(tuple(tensor.extents() or ())) for name, tensor in sources.items()}
    rest = [name for name, digest in known.items() if digest is None]
    with ThreadPoolExecutor(workers) as pool:
        known.update(zip(rest, pool.map(digest_of, [sources[name] for name in rest]), strict=True))
    return {name: digest or "" for name, digest in known.items()}


def plan_fingerprint(plan: ConversionPlan) -> str:
    """A digest of what will be written from what: the same plan of the same files has the same one."""
    text = hashlib.sha256(plan.source.derivation.encode())
    for file in plan.files:
        text.update(f"{file.name}:{file.size}".encode())
        for piece in file.pieces:
            text.update(f"{piece.name}@{piece.offset}:{piece.tensor.shape}:{piece.tensor.dtype}".encode())
    for name, data in plan.small:
        text.update(name.encode() + data)
    for path, name in plan.copies:
        text.update(name.encode() + path.read_bytes())
    ours = (plan.target, partial_folder(plan.target), journal_file(plan.target))
    for path in sorted(p for p in plan.source.path.rglob("*") if p.is_file()):
        if not any(mine in (path, *path.parents) for mine in ours):
            stat = path.stat()
            text.update(f"{path.name}:{stat.st_size}:{stat.st_mtime_ns}".encode())
    return text.hexdigest()
