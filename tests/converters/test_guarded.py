"""What a conversion guards: its target against others, its source against itself, and both against change meanwhile."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptbridge.converters.claim import claimed
from ckptbridge.converters.disk import take_name
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.execute import execute, plan_fingerprint
from ckptbridge.converters.journal import FINISHED, Journal, Record, journal_file
from ckptbridge.converters.model import open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.ranks import Rank
from ckptbridge.converters.receipt import RECEIPT_NAME, read_receipt
from ckptbridge.converters.recheck import recheck
from ckptbridge.converters.source_files import files_read
from ckptbridge.converters.target import partial_folder
from tests.conftest import TinyFolders
from tests.converters.crashing import digests
from tests.converters.running import ROOT, begin, planned

Swap = Callable[[int, int], None]


@pytest.fixture
def source(tiny_folder: TinyFolders, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder("llama"), tmp_path / "source")


def other_weights(folder: Path) -> None:
    """Weights of the same names and sizes."""
    file = folder / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def at_half(change: Callable[[], None]) -> Swap:
    """Progress that makes a change when half is done."""
    done: list[bool] = []

    def progress(so_far: int, total: int) -> None:
        if so_far > total / 2 and not done:
            done.append(True)
            change()

    return progress


# ---- others ---------------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from ckptbridge.converters.claim import claimed
from ckptbridge.converters.ranks import Rank
with claimed(Path(sys.argv[1]), Rank(rank=int(sys.argv[2]), world_size=int(sys.argv[2]) + 1)):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_a_target_that_another_process_writes_is_refused(
    rank: int, options: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    """Also a rank that outlived the others of its run."""
    target = tmp_path / "target"
    command = [sys.executable, "-c", HOLDER, str(target), str(rank)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(BadInputError, match=rf"target: another process \({holder.pid} on .*\) writes it"):
                execute(planned(source, target, **options))
            assert not partial_folder(target).exists()
        finally:
            holder.kill()
    execute(planned(source, target, **options))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_ranks_of_one_run_claim_beside_each_other(tmp_path: Path) -> None:
    with claimed(tmp_path / "t", Rank(rank=1, world_size=2)), claimed(tmp_path / "t", Rank(rank=0, world_size=2)):
        pass
    with (
        claimed(tmp_path / "t", Rank(rank=2, world_size=3)),
        pytest.raises(BadInputError),
        claimed(tmp_path / "t", Rank(rank=0, world_size=2)),
    ):
        pass
    assert not any(tmp_path.iterdir())


def test_journals_of_a_run_whose_folder_was_removed_are_not_believed(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    partial = begin(planned(source, target))
    stale = journal_file(target).rename(journal_file(target, 1))
    shutil.rmtree(partial)
    shutil.copy(stale, journal_file(target, 2))
    other_weights(source)
    receipt = execute(planned(source, target))
    assert recheck(open_model(source), receipt).passed
    assert recheck(open_model(target), receipt).passed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_a_journal_of_the_same_plan_whose_folder_was_removed_is_not_believed(source: Path, tmp_path: Path) -> None:
    """It would take files for finished that now have no more than their size."""
    target = tmp_path / "target"
    whole = tmp_path / "whole"
    execute(planned(source, whole))
    partial = begin(planned(source, target))
    journal_file(target).rename(journal_file(target, 1))
    shutil.rmtree(partial)
    begin(planned(source, target), share=0.05)
    execute(planned(source, target, resume=True))
    assert digests(target) == digests(whole)


def test_a_journal_of_another_plan_that_comes_meanwhile_is_not_believed(source: Path, tmp_path: Path) -> None:
    target, wrong = tmp_path / "target", Record(sources={"model.norm.weight": "0" * 16})
    foreign = Journal(journal_file(target, 7))
    receipt = execute(planned(source, target), at_half(lambda: foreign.begin("another plan", wrong)))
    assert recheck(open_model(source), receipt).passed


def test_a_folder_that_came_meanwhile_is_kept(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"

    def somebody_comes() -> None:
        target.mkdir()
        (target / "thesis.txt").write_text("years of work")

    with pytest.raises(BadInputError, match="already exists"):
        execute(planned(source, target), at_half(somebody_comes))
    assert (target / "thesis.txt").read_text() == "years of work"
    shutil.rmtree(target)
    before = {path: path.stat().st_mtime_ns for path in partial_folder(target).rglob("*") if path.is_file()}
    assert before
    execute(planned(source, target, resume=True))  # all was written: the name alone is missing
    after = {path.stat().st_mtime_ns for path in target.rglob("*") if path.is_file()}
    assert after == set(before.values())


def test_a_folder_with_the_name_of_what_is_set_aside_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: None)  # as where two names cannot be exchanged
    for name in ("target", "target.replaced", "target.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "what").write_text(name)
    take_name(tmp_path / "target.partial", tmp_path / "target")
    assert (tmp_path / "target" / "what").read_text() == "target.partial"
    assert (tmp_path / "target.replaced" / "what").read_text() == "target.replaced"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["target", "target.replaced"]


# ---- the source -----------------------------------------------------------------------------------------------------


def test_a_target_that_holds_what_is_read_is_not_replaced(source: Path, tmp_path: Path) -> None:
    execute(planned(source, tmp_path / "run"))
    before = digests(tmp_path / "run")
    for name in ("release", "hf"):
        plan = planned(tmp_path / "run", tmp_path / "run" / name, overwrite=True)
        with pytest.raises(BadInputError, match="--overwrite would destroy it"):
            execute(plan)
    assert digests(tmp_path / "run") == before


def test_a_target_that_links_lead_to_is_not_replaced(source: Path, tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    for file in source.iterdir():
        (links / file.name).symlink_to(file.resolve())
    with pytest.raises(BadInputError, match="--overwrite would destroy it"):
        execute(planned(links, source, overwrite=True))
    assert open_model(links).family.name == "llama"


def test_a_source_that_changes_while_it_is_read_is_told(source: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="the source changed while it was read"):
        execute(planned(source, tmp_path / "target"), at_half(lambda: other_weights(source)))
    assert not (tmp_path / "target").exists()
    with pytest.raises(BadInputError, match="begun from another source"):
        execute(planned(source, tmp_path / "target", resume=True))


def test_a_source_behind_a_link_that_changed_is_another(source: Path, tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(source)
    begin(planned(tmp_path / "run", tmp_path / "target"))
    other_weights(source)
    with pytest.raises(BadInputError, match="begun from another source"):
        execute(planned(tmp_path / "run", tmp_path / "target", resume=True))


def test_files_that_are_not_read_do_not_count(source: Path, tmp_path: Path) -> None:
    (source / "train.log").write_text("step 1\n")
    begin(planned(source, tmp_path / "target"))
    (source / "train.log").write_text("step 1\nstep 2\n")
    (source / "new").mkdir()
    receipt = execute(planned(source, tmp_path / "target", resume=True))
    assert recheck(open_model(tmp_path / "target"), receipt).passed


def test_what_stands_beside_tensors_belongs_to_the_plan(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    """Arguments of a legacy checkpoint are in its pickles, which are no tensors."""

    def print_of(**options: Any) -> str:
        return plan_fingerprint(planned(tiny_folder("llama"), tmp_path / "target", "torch", **options))

    assert print_of() == print_of()
    assert len({print_of(), print_of(layout=ParallelLayout(pp=2)), print_of(dtype=torch.bfloat16)}) == 3
    plan = planned(tiny_folder("llama"), tmp_path / "target", "torch")
    (offset, data), *others = plan.files[0].patches
    object.__setattr__(plan.files[0], "patches", ((offset, bytes([data[0] ^ 1]) + data[1:]), *others))
    assert plan_fingerprint(plan) != print_of()


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("to", ["hf", "torch_dist", "torch"])
def test_every_file_with_tensors_is_among_those_that_are_read(
    name: str, to: str, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    folder = tiny_folder(name)
    if to != "hf":
        execute(planned(folder, tmp_path / "saved", to))
        folder = tmp_path / "saved"
    found = set(files_read(planned(folder, tmp_path / "target", "hf" if to != "hf" else "torch_dist")))
    suffixes = (".safetensors", ".distcp") if to != "torch" else (".pt",)
    assert {path for path in folder.rglob("*") if path.suffix in suffixes and path.name != "common.pt"} <= found
    assert folder / ("config.json" if to == "hf" else "hf/config.json") in found


# ---- what is finished -----------------------------------------------------------------------------------------------


def test_a_finished_target_that_lost_something_is_not_finished(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    execute(planned(source, target))
    (target / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(BadInputError, match="already exists"):
        execute(planned(source, target, resume=True))


def test_a_receipt_elsewhere_does_not_finish_another_folder(source: Path, tmp_path: Path) -> None:
    receipt = tmp_path / "r.json"
    execute(planned(source, tmp_path / "one", receipt=receipt))
    (tmp_path / "two").mkdir()
    with pytest.raises(BadInputError, match="already exists"):
        execute(planned(source, tmp_path / "two", receipt=receipt, resume=True))


def test_a_kill_before_the_name_changes_leaves_only_that_to_do(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    execute(planned(source, target))
    whole = digests(target)
    target.rename(partial_folder(target))
    Journal(journal_file(target)).begin(FINISHED)
    execute(planned(source, target, resume=True))
    assert digests(target) == whole
    assert not journal_file(target).exists()


def test_a_receipt_within_the_target_lies_there(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    execute(planned(source, target))
    for name in (RECEIPT_NAME, "mine.json"):
        receipt = execute(planned(source, target, overwrite=True, receipt=target / name))
        assert read_receipt(target / name) == receipt


def test_a_receipt_knows_its_source_from_another_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    receipt = execute(planned(Path("source"), Path("target")))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert Path(receipt.source) == source.resolve()


def test_a_mount_point_is_no_target(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    target.mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == target)
    for options in ({}, {"overwrite": True}):
        with pytest.raises(BadInputError, match="is a mount point"):
            execute(planned(source, target, **options))
