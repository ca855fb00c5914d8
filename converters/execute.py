"""Carrying out a plan: whole or not at all, and resumable.

A folder under its own name is complete; `.partial` beside it is work in progress, with a journal of the files
that are finished. The journal is bound to the plan: it is refused when the source or an option has changed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ckptbridge.converters.convert import ConversionPlan
from ckptbridge.converters.copying import Copier, Progress, digest_of, sync_folder, write_file
from ckptbridge.converters.errors import BadInputError, StorageError
from ckptbridge.converters.hf_folder import INDEX, SINGLE
from ckptbridge.converters.mcore.torch_dist_reader import TRACKER
from ckptbridge.converters.output import OutputFile
from ckptbridge.converters.receipt import RECEIPT_NAME, Receipt
from ckptbridge.converters.tensors import Checkpoint, Extent

JOURNAL = "ckptbridge_journal.jsonl"


def partial_folder(target: Path) -> Path:
    """Where a target is built until it is whole."""
    return target.with_name(target.name + ".partial")


def execute(plan: ConversionPlan, progress: Progress | None = None) -> Receipt:
    """Write what the plan says. Returns the receipt, which also lies in the target.

    Raises BadInputError when the target exists or an input turns out broken, StorageError when the disk fails.
    """
    target, options = plan.target, plan.options
    partial = partial_folder(target)
    _prepare(plan, partial)
    _check_space(plan, partial)
    copier = Copier(partial, workers=options.workers, max_ram=options.max_ram, progress=progress, total=plan.nbytes)
    digests = _write_files(plan, partial, copier)
    try:
        for source, name in plan.copies:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            write_file(partial / name, source.read_bytes())
        for name, data in plan.small:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            write_file(partial / name, data)
        receipt = _receipt(plan, digests, copier.workers)
        write_file(options.receipt or partial / RECEIPT_NAME, receipt.to_json().encode())
        (partial / JOURNAL).unlink()
        for folder in (*{(partial / file.name).parent for file in plan.files}, partial):
            sync_folder(folder)
        _take_name(partial, target)
    except OSError as error:
        raise StorageError(
            f"{error.filename or partial}: {error.strerror}. What was written lies in {partial}"
        ) from error
    return receipt


def _prepare(plan: ConversionPlan, partial: Path) -> None:
    target, options = plan.target, plan.options
    if target.exists():
        if not options.overwrite:
            raise BadInputError(f"{target}: already exists; name another folder, or replace it with --overwrite")
        if not _is_checkpoint(target):
            raise BadInputError(f"{target}: is no checkpoint, so --overwrite does not replace it; name another folder")
        if target.resolve() == plan.source.path.resolve() or target.resolve() in plan.source.path.resolve().parents:
            raise BadInputError(f"{target}: is the source itself, which --overwrite would destroy; name another folder")
    first = json.dumps({"plan": plan_fingerprint(plan)}) + "\n"
    if partial.exists():
        if options.resume:
            journal = partial / JOURNAL
            if journal.exists() and not journal.read_text().startswith(first):
                raise BadInputError(
                    f"{partial}: was begun from another source or with other options; remove it, or run "
                    "without --resume "
                    "and with --overwrite"
                )
            if journal.exists():
                return
        elif not options.overwrite:
            raise BadInputError(
                f"{partial}: an earlier run did not finish; continue it with --resume, or begin anew with --overwrite"
            )
        shutil.rmtree(partial)
    try:
        partial.mkdir(parents=True)
        write_file(partial / JOURNAL, first.encode())
    except OSError as error:
        raise StorageError(f"{partial}: cannot be made: {error.strerror}") from error


def _is_checkpoint(folder: Path) -> bool:
    marks = (RECEIPT_NAME, TRACKER, "config.json", SINGLE, INDEX, "metadata.json")
    return not any(folder.iterdir()) or any((folder / mark).exists() for mark in marks)


def _check_space(plan: ConversionPlan, partial: Path) -> None:
    present = sum(p.stat().st_size for p in partial.rglob("*") if p.is_file())
    need = sum(file.size for file in plan.files) - present
    free = shutil.disk_usage(partial).free
    if need > free:
        raise StorageError(
            f"{partial}: the disk has {free / 1e9:.2f} GB free, {need / 1e9:.2f} GB are needed; nothing was written. "
            "Free some space, or name a folder on another disk"
        )


def _write_files(plan: ConversionPlan, partial: Path, copier: Copier) -> dict[str, str]:
    """Write every file that the journal does not hold yet; a line of the journal follows each."""
    journal = partial / JOURNAL
    digests: dict[str, str] = {}
    finished: set[str] = set()
    for line in journal.read_text().splitlines()[1:]:
        if line.endswith("}"):
            entry = json.loads(line)
            finished.add(entry["file"])
            digests.update(entry["digests"])
    for file in plan.files:
        if file.name in finished and (partial / file.name).stat().st_size == file.size:
            copier.advance(file.tensor_nbytes)
            continue
        written = copier.write(file)
        digests.update(written)
        with journal.open("a") as out:
            out.write(json.dumps({"file": file.name, "digests": written}) + "\n")
    return digests


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


def _take_name(partial: Path, target: Path) -> None:
    """Give the finished folder its name; a folder that it replaces is set aside first and removed last."""
    old = target.with_name(target.name + ".replaced")
    if target.exists():
        if old.exists():
            shutil.rmtree(old)
        target.rename(old)
    partial.rename(target)
    sync_folder(target.parent)
    if old.exists():
        shutil.rmtree(old)


def plan_fingerprint(plan: ConversionPlan) -> str:
    """A digest of what will be written from what: the same plan of the same files has the same one."""
    text = hashlib.sha256()
    for file in plan.files:
        text.update(f"{file.name}:{file.size}".encode())
        for piece in file.pieces:
            text.update(f"{piece.name}@{piece.offset}:{piece.tensor.shape}:{piece.tensor.dtype}".encode())
    for path in sorted(p for p in plan.source.path.rglob("*") if p.is_file()):
        stat = path.stat()
        text.update(f"{path.name}:{stat.st_size}:{stat.st_mtime_ns}".encode())
    return text.hexdigest()
