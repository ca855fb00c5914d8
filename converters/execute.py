"""Carrying out a plan: whole or not at all, resumable, and by one process or several.

A folder under its own name is complete; `.partial` beside it is work in progress, and `.partial.journal` tells which
of its files are finished. The journal is bound to the plan: it is refused when the source or an option has changed.
"""

from __future__ import annotations

import hashlib
import shutil
from contextlib import nullcontext
from pathlib import Path

from ckptbridge.converters.announced import refuse_announced
from ckptbridge.converters.byte_sizes import size_in_words
from ckptbridge.converters.claim import claimed
from ckptbridge.converters.convert import ConversionPlan
from ckptbridge.converters.copying import Copier, Progress, sum_nbytes
from ckptbridge.converters.direct import DirectWriter, is_worth_it
from ckptbridge.converters.disk import disk_message, sync_folder, take_name, write_file
from ckptbridge.converters.errors import BadInputError, StorageError
from ckptbridge.converters.finishing import Finisher
from ckptbridge.converters.finite import finite_notes
from ckptbridge.converters.journal import FINISHED, Journal, Record, journal_file, journal_files, read_journal
from ckptbridge.converters.mcore.legacy.replicas import check_replicas
from ckptbridge.converters.output import OutputFile
from ckptbridge.converters.ranks import Fellows, split_by_nbytes
from ckptbridge.converters.receipt import Receipt, read_receipt
from ckptbridge.converters.source_files import state_of_files
from ckptbridge.converters.target import check_receipt, check_target, is_complete, is_whole, partial_folder, receipt_in
from ckptbridge.converters.tasks import MOST_FILES, bundles_of
from ckptbridge.converters.witness import Witness

_COPIED, _COUNTED, _READ, _DONE = 1, 2, 3, 4
"""How far a rank is: its files are written; it knows what nobody has read whole; its share of that has digests; the
folder has its name."""


def execute(plan: ConversionPlan, progress: Progress | None = None) -> Receipt:
    """Write what the plan says. Returns the receipt, which also lies in the target.

    With `plan.options.rank` of several ranks, each calls it with the same plan and writes its share of the files.
    With `plan.options.resume` a target that this plan has finished is left as it is. Raises BadInputError when the
    target exists or an input turns out broken, StorageError when the disk or another rank fails.
    """
    partial = partial_folder(plan.target)
    try:
        with claimed(plan.target, plan.options.rank):
            if plan.options.resume and (receipt := _finished(plan, partial)) is not None:
                return receipt
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
            plan.source.remote.progress.prepare(fingerprint, [f.name for f in plan.files if is_whole(partial, f)])
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
    found = _told(plan, fingerprint).sources
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


def _finish(plan: ConversionPlan, partial: Path, journal: Journal, fingerprint: str) -> Receipt:
    """Write what lies beside the tensors, and give the folder its name."""
    if plan_fingerprint(plan) != fingerprint:
        raise BadInputError(
            f"{plan.source.path}: the source changed while it was read, so what was written is of no one state of it; "
            f"run again with --overwrite, or remove {partial}"
        )
    receipt = _receipt(plan, _told(plan, fingerprint), fingerprint)
    for source, name in plan.copies:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        write_file(partial / name, _copied(source))
    for name, data in plan.small:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        write_file(partial / name, data)
    for name, made in plan.reports:
        write_file(partial / name, made())
    if (inside := receipt_in(plan, partial)) is not None:
        inside.parent.mkdir(parents=True, exist_ok=True)
        write_file(inside, receipt.to_json().encode())
    for folder in (*(path for path in partial.rglob("*") if path.is_dir()), partial):
        sync_folder(folder)
    _remove_other_journals(plan, journal)
    journal.begin(FINISHED)
    _take_name(plan, partial, journal)
    if inside is None and plan.options.receipt is not None:
        write_file(plan.options.receipt, receipt.to_json().encode())
    return receipt


def _take_name(plan: ConversionPlan, partial: Path, journal: Journal) -> None:
    check_target(plan)  # once more: what came there meanwhile is not ours to remove
    take_name(partial, plan.target)
    if plan.source.remote is not None:
        plan.source.remote.remove()
    journal.path.unlink()


def _finished(plan: ConversionPlan, partial: Path) -> Receipt | None:
    """The receipt of a target that an earlier run of this plan completed but for its name, perhaps; None if none did.

    Only the receipt in the folder tells: one elsewhere may be of another folder by now.
    """
    journal = Journal(journal_file(plan.target))
    is_built = journal.path.exists() and read_journal(journal.path)[0] == FINISHED
    for folder in (plan.target, *([partial] if is_built and plan.options.rank.world_size == 1 else [])):
        file = receipt_in(plan, folder)
        if file is None or not file.is_file() or not is_complete(plan, folder):
            continue
        receipt = read_receipt(file)
        if receipt.plan != plan_fingerprint(plan):
            continue
        if folder == partial:
            _take_name(plan, partial, journal)
        return receipt
    return None


def _prepare(plan: ConversionPlan, partial: Path, fingerprint: str, journal: Journal) -> Record:
    """Make the partial folder with its journal, or find the one to resume; returns what is done already."""
    check_target(plan)
    check_receipt(plan)
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
    _remove_other_journals(plan, journal)
    journal.begin(fingerprint)
    partial.mkdir()
    return Record()


def _resumed(plan: ConversionPlan, partial: Path, fingerprint: str, journal: Journal) -> Record:
    """What all journals of the earlier run tell, as far as the files are still whole; kept in one journal."""
    record = _told(plan, fingerprint)
    names = {file.name: {piece.name for piece in file.pieces} for file in plan.files if is_whole(partial, file)}
    record.files = {name: digests for name, digests in record.files.items() if names.get(name) == digests.keys()}
    if plan.options.check_finite and record.bad:
        name, found = next(iter(record.bad.items()))
        raise BadInputError(
            f"{plan.source.path}: tensor {name!r} holds {found}; --check-finite asks that every weight is finite"
        )
    journal.begin(fingerprint, record)
    _remove_other_journals(plan, journal)
    return record


def _remove_other_journals(plan: ConversionPlan, journal: Journal) -> None:
    """Those of ranks of an earlier run: nobody is to believe them again."""
    for other in journal_files(plan.target):
        if other != journal.path:
            other.unlink()


def _told(plan: ConversionPlan, fingerprint: str) -> Record:
    """What the journals of all ranks of this plan tell together."""
    record = Record()
    for path in journal_files(plan.target):
        begun, told = read_journal(path)
        if begun == fingerprint:
            record.add(told)
    return record


def _copied(source: Path) -> bytes:
    try:
        return source.read_bytes()
    except OSError as error:
        raise StorageError(
            f"{source}: cannot be read: {error.strerror}; nothing that was written is lost: let it be read, and run "
            "again with --resume"
        ) from error


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
        source=str(plan.source.path.resolve() if plan.source.path.exists() else plan.source.path),
        source_format=plan.source.format,
        target_format=plan.to,
        family=plan.source.family.name,
        notes=(*plan.notes, *finite_notes(told.bad)),
        source_tensors={name: told.sources[name] for name in plan.source.sources},
        target_tensors={piece.name: told.files[file.name][piece.name] for file in plan.files for piece in file.pieces},
        source_nbytes=sum(tensor.nbytes for tensor in plan.source.sources.values()),
        target_nbytes=plan.nbytes,
        files={file.name: file.size for file in plan.files},
        not_finite={name: found.counts() for name, found in told.bad.items()},
        plan=fingerprint,  # of the source as it was when the run began
    )


def plan_fingerprint(plan: ConversionPlan) -> str:
    """A digest of what will be written from what: the same plan of the same files has the same one."""
    digest = hashlib.sha256(f"{plan.to}\n{plan.source.derivation}\n".encode())
    for file in plan.files:
        digest.update(f"\nfile {file.name}:{file.size}\n".encode())
        for piece in file.pieces:
            digest.update(f"{piece.name}@{piece.offset}:{piece.tensor.shape}:{piece.tensor.dtype}\n".encode())
        for offset, data in file.patches:  # headers, pickles, arguments
            digest.update(f"{len(data)} at {offset}:".encode() + data)
    for name, data in (*plan.small, *((name, _copied(path)) for path, name in plan.copies)):
        digest.update(f"\n{name}:{len(data)}:".encode() + data)
    digest.update(state_of_files(plan).encode())
    return digest.hexdigest()
