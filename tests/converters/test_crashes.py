"""Whole or not at all: kills at every step and at any moment, disks that fill up on the way."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import TinyFolders
from tests.converters.running import run_module
from tests.converters.sizable import write_sizable
from tests.tiny import TINY


@pytest.fixture(scope="module")
def sizable_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 25 MB: long enough to be killed on the way."""
    return write_sizable(tmp_path_factory.mktemp("sizable") / "llama")


@pytest.mark.parametrize(("name", "to"), [("mixtral", "torch_dist"), ("llama", "hf")])
def test_a_kill_at_any_durable_step_leaves_nothing_that_looks_complete(
    name: str, to: str, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    told = run_module("tests.converters.crashing", tiny_folder(name), tmp_path, to, "everywhere")
    assert len(told["attempts"]) > told["files"]  # every file is synced on its own
    for attempt in told["attempts"]:
        assert attempt["killed"]
        assert attempt["target"] in ("none", "whole"), told
        if attempt["target"] == "none":
            assert attempt["resumed"] == 0, told["stderr"]
            assert attempt["after"] == "whole"
            assert attempt["litter"] == []


def test_a_kill_at_any_moment_can_be_resumed_to_the_same_bytes(sizable_folder: Path, tmp_path: Path) -> None:
    told = run_module("tests.converters.crashing", sizable_folder, tmp_path, "torch_dist", "sometime")
    assert sum(attempt["killed"] for attempt in told["attempts"]) >= 3, told
    assert any(attempt["partial"] for attempt in told["attempts"]), told
    for attempt in told["attempts"]:
        assert attempt["target"] in ("none", "whole"), told
        assert attempt.get("after", "whole") == "whole", told


def test_a_kill_while_replacing_never_loses_both_checkpoints(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    told = run_module("tests.converters.crashing", tiny_folder("llama"), tmp_path, "torch_dist", "replacing")
    assert {attempt["target"] for attempt in told["attempts"]} >= {"old", "whole"}  # kills on both sides of the change
    for attempt in told["attempts"]:
        assert attempt["killed"]
        assert attempt["target"] in ("none", "old", "whole"), told
        assert attempt["target"] != "none" or attempt["replaced"] == "old", told
        if "after" in attempt:
            assert attempt["after"] == "whole", told["stderr"]
            assert attempt["litter"] == [], told


# ---- full disks -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[str, ...], Path]:
    """A command prefix under which a folder is a disk of 4 MB, and the folder."""
    disk = tmp_path_factory.mktemp("disk")
    mount = f'mount -t tmpfs -o size=4m tmpfs {disk} && exec "$@"'
    for unshare in (["unshare", "-m"], ["unshare", "-rm"]):
        prefix = (*unshare, "sh", "-c", mount, "sh")
        if (
            shutil.which("unshare")
            and not subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode
        ):
            return prefix, disk
    pytest.skip("no right to mount a small disk here; the test of RLIMIT_FSIZE covers the same path")


@pytest.mark.parametrize(("name", "max_file_size"), [("llama", 100_000), ("llama", 10**7), ("mixtral", 10**7)])
def test_a_disk_that_fills_up_ends_in_exit_code_4(
    name: str, max_file_size: int, small_disk: tuple[tuple[str, ...], Path], tiny_folder: TinyFolders
) -> None:
    prefix, disk = small_disk
    told = run_module("tests.converters.full_disk", tiny_folder(name), disk, "on the way", max_file_size, prefix=prefix)
    assert told["error"] == "StorageError", told["text"]
    assert told["exit_code"] == 4
    assert str(disk / "target.partial") in told["text"]
    assert "full" in told["text"]
    assert told["target"] is False
    assert told["partial"] is True
    assert told["resumed"] is True


def test_a_disk_that_is_too_small_is_told_before_the_work(
    small_disk: tuple[tuple[str, ...], Path], tiny_folder: TinyFolders
) -> None:
    prefix, disk = small_disk
    name = max(TINY, key=lambda name: sum(f.stat().st_size for f in tiny_folder(name).iterdir()))
    assert sum(f.stat().st_size for f in tiny_folder(name).iterdir()) > 1_700_000
    smaller = f'mount -t tmpfs -o size=1m tmpfs {disk} && exec "$@"'
    prefix = (*prefix[:-2], smaller, "sh")
    told = run_module("tests.converters.full_disk", tiny_folder(name), disk, "at once", 100_000, prefix=prefix)
    assert (told["error"], told["exit_code"], told["target"]) == ("StorageError", 4, False), told["text"]
    assert str(disk) in told["text"]
    assert "MB are needed" in told["text"]


def test_a_file_that_may_not_grow_ends_in_exit_code_4(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    told = run_module("tests.converters.full_disk", tiny_folder("llama"), tmp_path, "file size", 5_000_000)
    assert (told["error"], told["exit_code"]) == ("StorageError", 4), told["text"]
    assert str(tmp_path / "target.partial") in told["text"]
    assert (told["target"], told["partial"]) == (False, True)
