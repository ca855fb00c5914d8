"""Several processes that share a conversion: the same bytes as one alone, and nobody waits for the dead."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.ranks import Rank, split_by_nbytes, this_rank
from ckptbridge.converters.receipt import read_receipt
from tests.conftest import TinyFolders
from tests.converters.crashing import digests
from tests.converters.running import ROOT, planned
from tests.converters.sizable import write_sizable

SIZES = {"max_file_size": 1_500_000, "max_shard_size": 1_500_000}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sizable(tmp_path_factory.mktemp("sizable") / "llama")


def run_ranks(
    source: Path,
    target: Path,
    changes: Sequence[dict[str, Any] | None],
    to: str = "torch_dist",
    patience: float = 30,
    common: dict[str, Any] = SIZES,
) -> list[dict[str, Any]]:
    """One process a rank, all at once; `changes` are what each is told beside the common, None is not started."""
    running: list[subprocess.Popen[str] | None] = []
    for rank, change in enumerate(changes):
        if change is None:
            running.append(None)
            continue
        told = {"source": str(source), "target": str(target), "to": to, "rank": rank, "world_size": len(changes)}
        told |= {"patience": patience, "options": common | change.pop("options", {}), **change}
        command = [sys.executable, "-m", "tests.converters.one_rank", json.dumps(told)]
        running.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
    ended: list[dict[str, Any]] = []
    for process in running:
        if process is None:
            ended.append({"error": "absent"})
            continue
        out, _ = process.communicate(timeout=200)
        ended.append(json.loads(out) if process.returncode == 0 else {"error": process.returncode})
    return ended


def beside(target: Path) -> list[str]:
    """What lies in the target's folder beside it."""
    return sorted(path.name for path in target.parent.iterdir() if path != target)


@pytest.mark.parametrize("to", ["torch_dist", "hf"])
def test_three_processes_write_what_one_writes(to: str, source: Path, tmp_path: Path) -> None:
    layout = {"tp": 2, "pp": 2} if to == "torch_dist" else {}
    alone = planned(source, tmp_path / "alone" / "it", to, **SIZES, layout=ParallelLayout(**layout))
    execute(alone)
    target = tmp_path / "shared" / "it"
    ended = run_ranks(source, target, [{"options": {"layout": layout}} for _ in range(3)], to)
    assert [rank["error"] for rank in ended] == [None] * 3, ended
    assert digests(target) == digests(tmp_path / "alone" / "it")
    assert beside(target) == []
    assert sum(rank["share"] for rank in ended) == alone.nbytes
    assert max(rank["share"] for rank in ended) < 0.45 * alone.nbytes


@pytest.mark.parametrize("late", range(2))
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_rank_that_is_late_to_look_reads_its_share(
    name: str, late: int, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    """Parts of a tensor lie in files of both ranks, so nobody read it whole: both must see the same of these."""
    source, target, layout = tiny_folder(name), tmp_path / "shared" / "it", {"tp": 2}
    changes: list[dict[str, Any] | None] = [{"options": {"layout": layout}, "late": 0.0} for _ in range(2)]
    changes[late] = {"options": {"layout": layout}, "late": 1.0}
    ended = run_ranks(source, target, changes, common={})
    assert [rank["error"] for rank in ended] == [None] * 2, ended
    alone = execute(planned(source, tmp_path / "alone" / "it", layout=ParallelLayout(**layout)))
    assert read_receipt(target).source_tensors == alone.source_tensors


@pytest.mark.parametrize("ranks_afterwards", [1, 2])
def test_a_killed_rank_is_named_and_the_rest_resumed(ranks_afterwards: int, source: Path, tmp_path: Path) -> None:
    execute(planned(source, tmp_path / "alone" / "it", **SIZES))
    target = tmp_path / "shared" / "it"
    begun = time.monotonic()
    ended = run_ranks(source, target, [{}, {"die_at": 0.7}, {}], patience=20)
    assert time.monotonic() - begun < 90
    assert ended[1]["error"] == -signal.SIGKILL
    for rank in (0, 2):
        assert ended[rank]["error"] == "StorageError", ended
        assert "rank 1 of 3" in ended[rank]["text"] or "rank 1 of 3" in ended[2 - rank]["text"]
        assert "--resume" in ended[rank]["text"]
    assert not target.exists()
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "shared" / "it.partial").rglob("*.distcp")}
    ended = run_ranks(source, target, [{"options": {"resume": True}} for _ in range(ranks_afterwards)])
    assert [rank["error"] for rank in ended] == [None] * ranks_afterwards, ended
    assert digests(target) == digests(tmp_path / "alone" / "it")
    assert beside(target) == []
    kept = [
        p for p, stamp in written.items() if (target / p.relative_to(f"{target}.partial")).stat().st_mtime_ns == stamp
    ]
    assert len(kept) >= len(written) // 2  # two of three ranks had finished theirs


def test_beginning_anew_after_a_crash_is_not_misled_by_what_it_left(source: Path, tmp_path: Path) -> None:
    """The files of the dead name the same ranks, and the same plan."""
    execute(planned(source, tmp_path / "alone" / "it", **SIZES))
    target = tmp_path / "shared" / "it"
    run_ranks(source, target, [{"die_at": 0.5}, {"die_at": 0.9}, {"die_at": 1.0}], patience=20)
    assert len(beside(target)) >= 5  # the partial folder, journals, the ranks' files
    ended = run_ranks(source, target, [{"options": {"overwrite": True}} for _ in range(3)])
    assert [rank["error"] for rank in ended] == [None] * 3, ended
    assert digests(target) == digests(tmp_path / "alone" / "it")
    assert beside(target) == []


def test_a_rank_that_never_comes_is_named_to_everybody(source: Path, tmp_path: Path) -> None:
    ended = run_ranks(source, tmp_path / "it", [{}, {}, None], patience=20)
    for rank in (0, 1):
        assert ended[rank]["error"] == "StorageError", ended
    assert "rank 2 of 3 gave no sign of life for 20 s" in ended[0]["text"]
    assert "rank 0 of 3" in ended[1]["text"]
    assert not (tmp_path / "it").exists()


def test_a_rank_that_fails_ends_the_others(source: Path, tmp_path: Path) -> None:
    (tmp_path / "it").mkdir()
    ended = run_ranks(source, tmp_path / "it", [{}, {}], patience=30)
    assert ended[0]["error"] == "BadInputError"
    assert ended[1]["error"] == "StorageError"
    assert "already exists" in ended[1]["text"]
    assert "rank 0 of 2" in ended[1]["text"]


def test_ranks_that_were_asked_for_different_things_do_not_mix(source: Path, tmp_path: Path) -> None:
    ended = run_ranks(source, tmp_path / "it", [{}, {"options": {"max_file_size": 2_000_000}}])
    assert ended[1]["error"] == "BadInputError"
    assert "same command" in ended[1]["text"]
    assert ended[0]["error"] == "StorageError"
    assert "rank 1 of 2" in ended[0]["text"]
    assert not (tmp_path / "it").exists()


SRUN = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, (1, 4)),
        ({"WORLD_SIZE": "4"}, (0, 1)),
        (SRUN, (2, 4)),
        ({**SRUN, "RANK": "5", "WORLD_SIZE": "8"}, (5, 8)),  # torchrun, started by srun
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1)),  # the shell of sbatch
        ({**SRUN, "SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0"}, (0, 1)),  # salloc's interactive step
        ({**SRUN, "SLURM_STEP_ID": "4294967291", "SLURM_PROCID": "0"}, (0, 1)),  # the batch step
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, (0, 1)),  # srun --pty bash
    ],
)
def test_who_a_process_is(environment: dict[str, str], expected: tuple[int, int]) -> None:
    assert this_rank(environment) == Rank(rank=expected[0], world_size=expected[1])


@pytest.mark.parametrize("change", [{"RANK": "4"}, {"RANK": "x"}, {"RANK": "-1"}, {"WORLD_SIZE": "0"}])
def test_numbers_that_contradict_each_other_are_refused(change: dict[str, str]) -> None:
    with pytest.raises(BadInputError, match="RANK="):
        this_rank({"RANK": "1", "WORLD_SIZE": "4"} | change)


@given(st.lists(st.integers(0, 10**12), max_size=40), st.integers(1, 9))
def test_the_split_is_even(sizes: list[int], ranks: int) -> None:
    owners = split_by_nbytes(sizes, ranks)
    loads = [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank) for rank in range(ranks)]
    assert sum(loads) == sum(sizes)
    assert max(loads) - min(loads) <= max(sizes, default=0)
