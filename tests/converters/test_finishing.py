"""Files become durable behind the copying: in order, told only afterwards, closed whatever happens."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ckptbridge.converters.disk import disk_message
from ckptbridge.converters.errors import StorageError
from ckptbridge.converters.execute import execute, journal_file, partial_folder
from ckptbridge.converters.finishing import Finisher
from tests.conftest import TinyFolders
from tests.converters.running import begin, planned


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def opened(path: Path, data: bytes = b"x" * 5000) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    os.write(descriptor, data)
    return descriptor


def test_a_file_is_told_when_it_is_closed_and_durable(tmp_path: Path) -> None:
    before, told = open_descriptors(), list[tuple[str, int]]()
    with Finisher(disk_message) as finisher:
        for name in "abc":
            descriptor = opened(tmp_path / name)
            finisher.begin(descriptor, 0, 5000)
            finisher.finish(descriptor, tmp_path / name, lambda name=name: told.append((name, open_descriptors())))  # type: ignore[misc]
    assert [name for name, _ in told] == ["a", "b", "c"]
    assert open_descriptors() == before


def test_a_file_that_cannot_be_synced_is_named_and_never_told(tmp_path: Path) -> None:
    """A pipe cannot be synced: EINVAL comes from the system itself."""
    before, told = open_descriptors(), list[str]()
    reading, writing = os.pipe()
    with pytest.raises(StorageError, match="broken"), Finisher(disk_message) as finisher:  # noqa: PT012
        finisher.finish(writing, tmp_path / "broken", lambda: told.append("broken"))
        finisher.finish(opened(tmp_path / "sound"), tmp_path / "sound", lambda: told.append("sound"))
    os.close(reading)
    assert told == ["sound"]
    assert open_descriptors() == before


def test_an_error_of_the_copying_is_the_one_that_comes_out(tmp_path: Path) -> None:
    before, told = open_descriptors(), list[str]()
    with pytest.raises(KeyError), Finisher(disk_message) as finisher:  # noqa: PT012
        finisher.finish(opened(tmp_path / "a"), tmp_path / "a", lambda: told.append("a"))
        descriptor = opened(tmp_path / "b")
        finisher.begin(descriptor, 0, 5000)
        finisher.abandon(descriptor)
        raise KeyError
    assert told == ["a"]
    assert open_descriptors() == before


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_what_is_interrupted_leaves_nothing_open_and_a_true_journal(
    share: float, workers: int, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    before = open_descriptors()
    plan = planned(tiny_folder("mixtral"), tmp_path / "target", workers=workers)
    begin(plan, share)
    assert open_descriptors() == before
    sizes = {file.name: file.size for file in plan.files}
    for line in journal_file(plan.target).read_text().splitlines()[1:]:
        name = line.split('"')[3]
        assert (partial_folder(plan.target) / name).stat().st_size == sizes[name]
    execute(planned(tiny_folder("mixtral"), tmp_path / "target", workers=workers, resume=True))
    assert open_descriptors() == before


def test_a_line_of_the_journal_stands_only_behind_the_sync_of_its_file(
    tiny_folder: TinyFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(tiny_folder("mixtral"), tmp_path / "target", workers=3)
    partial, sync, synced = partial_folder(plan.target), os.fsync, list[str]()

    def looking(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.suffix == ".distcp":
            name = str(path.relative_to(partial))
            assert name not in journal_file(plan.target).read_text()
            assert path.stat().st_size == {file.name: file.size for file in plan.files}[name]
            synced.append(name)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", looking)
    execute(plan)
    assert sorted(synced) == sorted(file.name for file in plan.files)
