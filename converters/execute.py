"""Carrying out a plan: whole or not at all, resumable, and by one process or several.

A folder under its own name is complete; `.partial` beside it is work in progress, and `.partial.journal` tells which
of its files are finished. The journal is bound to the plan: it is refused when the source or an option has changed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from ckptbridge.converters.announced import refuse_announced
from ckptbridge.converters.byte_sizes import size_in_words
from ckptbridge.converters.convert import ConversionPlan
from ckptbridge.converters.copying import Copier, Progress, sum_nbytes
from ckptbridge.converters.direct import DirectWriter, is_worth_it
from ckptbridge.converters.disk import PARTIAL_SUFFIX, disk_message, sync_folder, take_name, write_file
from ckptbridge.converters.errors import BadInputError, StorageError
from ckptbridge.converters.finishing import Finisher
from ckptbridge.converters.hf_folder import INDEX, SINGLE
from ckptbridge.converters.journal import FINISHED, Journal, Record, journal_file, journal_files, read_journal
from ckptbridge.converters.mcore.legacy.replicas import check_replicas
from ckptbridge.converters.mcore.torch_dist_reader import TRACKER
from ckptbridge.converters.output import OutputFile
from ckptbridge.converters.ranks import Fellows, split_by_nbytes
from ckptbridge.converters.receipt import RECEIPT_NAME, Receipt, read_receipt
from ckptbridge.converters.tasks import MOST_FILES, bundles_of
from ckptbridge.converters.witness import Witness

_COPIED, _COUNTED, _READ, _DONE = 1, 2, 3, 4
"""How far a rank is: its files are written; it knows what nobody has read whole; its share of that has digests; the
folder has its name."""


def partial_folder(target: Path) -> Path:
    """Where a target is built until it is whole."""
    return target.with_name(target.name + PARTIAL_SUFFIX)


def execute(plan: ConversionPlan, progress: Progress | None = None) -> Receipt:
    """Write what the plan says. Returns the receipt, which also lies in the target.

    With `plan.options.rank` of several ranks, each calls it with the same plan and writes its share of the files.
    With `plan.options.resume` a target that this plan has finished is left as it is. Raises BadInputError when the
    target exists or an input turns out broken, StorageError when the disk or another rank fails.
    """
    if (finished := _finished(plan)) is not None:
        return finished
    partial = partial_folder(plan.target)
    try:
        with Fellows(plan.options.rank, plan.target) as fellows:
            return _execute(plan, partial, fellows, progress)
    except OSError as error:
        raise StorageError(disk_message(Path(error.filename or partial), error)) from error


def _execute(plan: ConversionPlan, partial: Path, fellows: Fellows, progress: Progress | None) -> Receipt:
    refuse_announced(plan.source.sources)
    me, fingerprint = plan.options.rank, plan_fingerprint(plan)
    journal = Journal(journal_file(plan.target, me.rank))
    if me.rank == 0:
        fellows.gather()
        for model in plan.source.opened:
            check_replicas(model.saved, model.family, model.config)
        record = _prepare(plan, partial, fingerprint, journal)
        if plan.source.remote is not None:
            plan.source.remote.progress.prepare(fingerprint, [f.name for f in plan.files if _is_whole(partial, f)])
        _check_space(plan, partial)
        shares = _shares(plan, record)
        fellows.share({"plan": fingerprint, "files": shares, "known": sorted(record.sources)})
        share, known = shares[0], record.sources.keys()
    else:
        told = fellows.shared()
        if told["plan"] != fingerprint:
            raise BadInputError(
                f"rank {me.rank} was asked for another conversion than rank 0, or sees another source: start all "
                "ranks with the same command"
            )
        share, known = told["files"][me.rank], set(told["known"])
        journal.begin(fingerprint)
    sources = {name: tensor for name, tensor in plan.source.sources.items() if name not in known}
    witness = Witness(sources, refuse=plan.options.check_finite)
    _write_files(plan, partial, set(share), journal, witness, progress)
    fellows.reach(_COPIED, "waiting for it to write its files")
    found = _told(plan).sources
    missing = [name for name in plan.source.sources if name not in found]
    # All count from the same journals: a rank that went on to add to its own would leave others a shorter list.
    fellows.reach(_COUNTED, "waiting for it to count what is left to read")
    owners = split_by_nbytes([plan.source.sources[name].nbytes for name in missing], me.world_size)
    mine = [name for name, owner in zip(missing, owners, strict=True) if owner == me.rank]
    journal.add_sources(witness.finish(mine, plan.options.workers), witness.bad())
    fellows.reach(_READ, "waiting for it to read its share of the source")
    if me.rank:
        fellows.wait_for_first(_DONE, "waiting for it to finish the folder")
        fellows.leave()
        return read_receipt(plan.options.receipt or plan.target)
    receipt = _finish(plan, partial, journal, fingerprint)
    fellows.dismiss(_DONE)
    return receipt


def _finished(plan: ConversionPlan) -> Receipt | None:
    """The receipt of a target that an earlier run of this plan completed, where the run is to be resumed."""
    receipt = plan.options.receipt or plan.target / RECEIPT_NAME
    if not (plan.options.resume and plan.target.is_dir() and receipt.is_file()):
        return None
    found = read_receipt(receipt)
    return found if found.plan == plan_fingerprint(plan) else None


def _finish(plan: ConversionPlan, partial: Path, journal: Journal, fingerprint: str) -> Receipt:
    """Write what lies beside the tensors, and give the folder its name."""
    receipt = _receipt(plan, _told(plan), fingerprint)
    for source, name in plan.copies:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        write_file(partial / name, _copied(source))
    for name, data in plan.small:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        write_file(partial / name, data)
    for name, made in plan.reports:
        write_file(partial / name, made())
    write_file(plan.options.receipt or partial / RECEIPT_NAME, receipt.to_json().encode())
    for folder in (*{(partial / file.name).parent for file in plan.files}, partial):
        sync_folder(folder)
    for other in journal_files(plan.target)[1:]:
        other.unlink()
    journal.begin(FINISHED)
    take_name(partial, plan.target)
    if plan.source.remote is not None:
        plan.source.remote.remove()
    journal.path.unlink()
    return receipt


def _prepare(plan: ConversionPlan, partial: Path, fingerprint: str, journal: Journal) -> Record:
    """Make the partial folder with its journal, or find the one to resume; returns what is done already."""
    _check_target(plan)
    _check_receipt(plan)
    journals = journal_files(plan.target) if partial.exists() else []
    if partial.exists() and any(partial.iterdir()):
        if not journal.path.exists():
            raise BadInputError(
                f"{partial}: is no unfinished conversion, so it is left alone; remove it, or name another target"
            )
        begun, _ = read_journal(journal.path)
        if plan.options.resume and begun == fingerprint:
            return _resumed(plan, partial, fingerprint, journal)
        if plan.options.resume and begun != FINISHED:
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
    for other in journals[1:]:
        other.unlink()
    journal.begin(fingerprint)
    partial.mkdir()
    return Record()


def _resumed(plan: ConversionPlan, partial: Path, fingerprint: str, journal: Journal) -> Record:
    """What all journals of the earlier run tell, as far as the files are still whole; kept in one journal."""
    record = _told(plan, fingerprint)
    names = {file.name: {piece.name for piece in file.pieces} for file in plan.files if _is_whole(partial, file)}
    record.files = {name: digests for name, digests in record.files.items() if names.get(name) == digests.keys()}
    if plan.options.check_finite and record.bad:
        name, found = next(iter(record.bad.items()))
        raise BadInputError(
            f"{plan.source.path}: tensor {name!r} holds {found}; --check-finite asks that every weight is finite"
        )
    journal.begin(fingerprint, record)
    for other in journal_files(plan.target)[1:]:
        other.unlink()
    return record


def _is_whole(partial: Path, file: OutputFile) -> bool:
    """Whether a file has its size; a journal tells whether it is filled."""
    path = partial / file.name
    return path.is_file() and path.stat().st_size == file.size


def _told(plan: ConversionPlan, fingerprint: str | None = None) -> Record:
    """What the journals of all ranks tell together; with a fingerprint, those of other plans are left out."""
    record = Record()
    for path in journal_files(plan.target):
        begun, told = read_journal(path)
        if fingerprint is None or begun == fingerprint:
            record.add(told)
    return record


def _check_target(plan: ConversionPlan) -> None:
    target = plan.target
    if not target.exists():
        return
    if not plan.options.overwrite:
        raise BadInputError(f"{target}: already exists; name another folder, or replace it with --overwrite")
    if not target.is_dir() or not is_checkpoint(target):
        raise BadInputError(f"{target}: is no checkpoint, so --overwrite does not replace it; name another folder")
    sources = [model.path.resolve() for model in plan.source.opened]
    if any(target.resolve() in (source, *source.parents) for source in sources):
        raise BadInputError(f"{target}: is the source itself, which --overwrite would destroy; name another folder")


def _check_receipt(plan: ConversionPlan) -> None:
    """A receipt of its own name is written last: what stands in its way is told first."""
    receipt = plan.options.receipt
    if receipt is None:
        return
    if not receipt.parent.is_dir():
        raise BadInputError(f"--receipt {receipt}: there is no folder {receipt.parent}; make it, or name another file")
    if receipt.is_dir() or not os.access(receipt.parent, os.W_OK):
        why = "is a folder" if receipt.is_dir() else f"{receipt.parent} cannot be written to"
        raise BadInputError(f"--receipt {receipt}: {why}; name another file")


def _copied(source: Path) -> bytes:
    try:
        return source.read_bytes()
    except OSError as error:
        raise StorageError(
            f"{source}: cannot be read: {error.strerror}; nothing that was written is lost: let it be read, and run "
            "again with --resume"
        ) from error


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is empty or holds what a checkpoint has, so that a new one may replace it."""
    marks = (RECEIPT_NAME, TRACKER, "config.json", SINGLE, INDEX, "metadata.json")
    return not any(folder.iterdir()) or any((folder / mark).exists() for mark in marks)


def _check_space(plan: ConversionPlan, partial: Path) -> None:
    present = sum(p.stat().st_size for p in partial.rglob("*") if p.is_file())
    need = sum(file.size for file in plan.files) - present
    free = shutil.disk_usage(partial).free
    if need > free:
        raise StorageError(
            f"{partial}: the disk has {size_in_words(free)} free, {size_in_words(need)} are needed; no tensor was "
            "written. Free some space and run again, conversions with --resume, or name a folder on another disk"
        )


def _shares(plan: ConversionPlan, record: Record) -> list[list[str]]:
    """The names of the files that each rank writes: what is not finished yet, files that share much together."""
    ranks = plan.options.rank.world_size
    bundles = bundles_of([file for file in plan.files if file.name not in record.files], _most_files(plan))
    shares: list[list[str]] = [[] for _ in range(ranks)]
    for bundle, owner in zip(bundles, split_by_nbytes(map(sum_nbytes, bundles), ranks), strict=True):
        shares[owner] += [file.name for file in bundle]
    return shares


def _most_files(plan: ConversionPlan) -> int:
    """Of one bundle: with as many ranks as files, each file is a rank's own."""
    return max(1, min(MOST_FILES, len(plan.files) // plan.options.rank.world_size))


def _write_files(
    plan: ConversionPlan,
    partial: Path,
    share: set[str],
    journal: Journal,
    witness: Witness,
    progress: Progress | None,
) -> None:
    """Write this rank's files; a line of the journal follows each one that is durable."""
    options = plan.options
    files = [file for file in plan.files if file.name in share]
    alone = options.rank.world_size == 1
    total = plan.nbytes if alone else sum_nbytes(files)

    def copier(direct: DirectWriter | None = None) -> Copier:
        made = Copier(
            partial,
            workers=options.workers,
            max_ram=options.max_ram - (options.direct_nbytes if direct else 0),
            progress=progress,
            total=total,
            witness=witness,
            direct=direct,
        )
        if total > sum_nbytes(files):
            made.advance(total - sum_nbytes(files))
        return made

    def note(file: OutputFile, digests: dict[str, str]) -> None:
        journal.add_file(file.name, digests, witness.digests(), witness.bad())

    if (remote := plan.source.remote) is not None:
        from ckptbridge.converters.hub.streaming import Streaming

        Streaming(shards=remote, copier=copier(), journal=journal, done=note).write(files)
        return
    is_direct = is_worth_it(partial, plan.nbytes) if options.direct_io is None else options.direct_io
    writer = DirectWriter(options.direct_nbytes) if is_direct else nullcontext()
    with writer as direct, Finisher(disk_message) as finisher:
        copying = copier(direct)
        for bundle in bundles_of(files, _most_files(plan)):
            copying.write_together(bundle, finisher, note)
            finisher.check()


def _receipt(plan: ConversionPlan, told: Record, fingerprint: str) -> Receipt:
    if absent := [file.name for file in plan.files if file.name not in told.files]:
        raise StorageError(f"{plan.target}: {', '.join(absent[:4])} of the output were not written")
    return Receipt(
        source=str(plan.source.path),
        source_format=plan.source.format,
        target_format=plan.to,
        family=plan.source.family.name,
        notes=(*plan.notes, *_finite_notes(told)),
        source_tensors={name: told.sources[name] for name in plan.source.sources},
        target_tensors={piece.name: told.files[file.name][piece.name] for file in plan.files for piece in file.pieces},
        source_nbytes=sum(tensor.nbytes for tensor in plan.source.sources.values()),
        target_nbytes=plan.nbytes,
        files={file.name: file.size for file in plan.files},
        not_finite={name: {"nan": found.nan, "infinite": found.infinite} for name, found in told.bad.items()},
        plan=fingerprint,  # of the source as it was when the run began
    )


def _finite_notes(told: Record) -> Sequence[str]:
    if not told.bad:
        return ()
    first = "; ".join(f"{name}: {found}" for name, found in list(told.bad.items())[:3])
    return (f"{len(told.bad)} tensors of the source hold numbers that are not finite, and so does the result: {first}",)


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
        text.update(name.encode() + _copied(path))
    ours = str(partial_folder(plan.target))  # and what lies beside it: journals, the ranks' own files
    for path in sorted(p for model in plan.source.opened for p in model.path.rglob("*") if p.is_file()):
        if plan.target not in (path, *path.parents) and not str(path).startswith(ours):
            stat = path.stat()
            text.update(f"{path.name}:{stat.st_size}:{stat.st_mtime_ns}".encode())
    return text.hexdigest()
