"""Direct writes: the same bytes as through the page cache, whatever the offsets, and every failure told."""

from __future__ import annotations

import errno
import mmap
import os
import random
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from ckptbridge.converters import direct, drafts
from ckptbridge.converters.direct import ALIGNMENT, DirectFile, DirectRun, DirectWriter, is_worth_it, open_direct
from ckptbridge.converters.disk import reserve, write_exactly
from ckptbridge.converters.errors import StorageError
from ckptbridge.converters.execute import execute, partial_folder
from tests.conftest import TinyFolders
from tests.converters.crashing import digests
from tests.converters.running import Interrupted, interrupt_after, planned
from tests.converters.sizable import write_sizable
from tests.converters.test_finishing import open_descriptors

TWO_BLOCKS = 2 * ALIGNMENT


def opened_direct(path: Path) -> int:
    """`open_direct`; the test is skipped where the temporary folder's file system has no direct writes."""
    made = open_direct(path)
    if made is None:
        pytest.skip("the file system of the temporary folder has no direct writes")
    return made


class Written:
    """A file of `size` bytes that is open both ways, and what went through the page cache."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        reserve(self.descriptor, size)
        self.cached: list[tuple[int, int]] = []
        self.direct_descriptor = opened_direct(path)
        self.file = DirectFile(path, self.direct_descriptor, self.put)

    def put(self, offset: int, data: memoryview) -> None:
        self.cached.append((offset, offset + len(data)))
        write_exactly(self.descriptor, offset, data)

    def close(self) -> bytes:
        self.file.close()
        os.close(self.descriptor)
        return self.path.read_bytes()


def started(writer: DirectWriter, file: DirectFile, offset: int, nbytes: int) -> DirectRun:
    run = writer.run(file, offset, nbytes)
    assert run is not None
    return run


@pytest.mark.parametrize("seed", range(20))
def test_runs_that_touch_make_the_same_file(seed: int, tmp_path: Path) -> None:
    """Neighbours share a block; blocks of any length arrive; only what shares a block goes through the cache."""
    dice = random.Random(seed)
    data = dice.randbytes(dice.randrange(1, 40 * ALIGNMENT))
    cuts = [0, *sorted(dice.randrange(len(data)) for _ in range(3)), len(data)]
    written = Written(tmp_path / "file", len(data))
    with DirectWriter(8 * TWO_BLOCKS, TWO_BLOCKS) as writer:
        for start, stop in pairwise(cuts):
            run = started(writer, written.file, start, stop - start)
            at = start
            while at < stop:
                count = min(stop - at, dice.randrange(1, 3 * ALIGNMENT))
                run.put(memoryview(data)[at : at + count])
                at += count
            writer.end(run)
        assert written.close() == data
    edges = {cut // ALIGNMENT for cut in cuts}
    assert {block for start, stop in written.cached for block in range(start // ALIGNMENT, -(-stop // ALIGNMENT))} <= (
        edges
    )


def test_many_runs_at_once_share_few_buffers(tmp_path: Path) -> None:
    """Each of three runs holds a buffer that is not full, and there are six: nobody waits for ever."""
    nbytes = 64 * ALIGNMENT
    written = Written(tmp_path / "file", 4 * nbytes)
    data = random.Random(0).randbytes(4 * nbytes)
    with DirectWriter(6 * TWO_BLOCKS, TWO_BLOCKS) as writer:
        runs = [started(writer, written.file, number * nbytes, nbytes) for number in range(3)]
        assert writer.run(written.file, 3 * nbytes, nbytes) is None
        for at in range(0, nbytes, 1000):
            for number, run in enumerate(runs):
                start = number * nbytes
                run.put(memoryview(data)[start + at : start + min(nbytes, at + 1000)])
        writer.end(runs[0])
        last = started(writer, written.file, 3 * nbytes, nbytes)
        last.put(memoryview(data)[3 * nbytes :])
        for run in (*runs[1:], last):
            writer.end(run)
        assert written.close() == data


def test_a_failed_write_names_the_file_and_ends_the_run(tmp_path: Path) -> None:
    """A descriptor that may only be read fails as a broken disk does: in the thread that writes."""
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    file = DirectFile(path, os.open(path, os.O_RDONLY), lambda offset, data: None)
    with DirectWriter(4 * TWO_BLOCKS, TWO_BLOCKS) as writer:
        run = started(writer, file, 0, 1 << 20)
        with pytest.raises(StorageError, match="file: cannot be written"):  # noqa: PT012
            for _ in range(1 << 8):
                run.put(memoryview(bytes(ALIGNMENT)))
            file.close()


def test_the_last_write_that_fails_is_told_when_the_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(TWO_BLOCKS))
    file = DirectFile(path, os.open(path, os.O_RDONLY), lambda offset, data: None)
    with DirectWriter(4 * TWO_BLOCKS, TWO_BLOCKS) as writer:
        run = started(writer, file, 0, TWO_BLOCKS)
        run.put(memoryview(bytes(TWO_BLOCKS)))
        writer.end(run)
        with pytest.raises(StorageError, match="file: cannot be written"):
            file.close()


def test_a_file_system_that_refuses_gets_the_bytes_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = random.Random(0).randbytes(10 * ALIGNMENT + 5)
    written = Written(tmp_path / "file", len(data))
    through = os.pwrite

    def refusing(descriptor: int, block: memoryview, offset: int) -> int:
        if descriptor == written.direct_descriptor:
            raise OSError(errno.EINVAL, "not for this file")
        return through(descriptor, block, offset)

    monkeypatch.setattr(os, "pwrite", refusing)
    with DirectWriter(4 * TWO_BLOCKS, TWO_BLOCKS) as writer:
        run = started(writer, written.file, 0, len(data))
        run.put(memoryview(data))
        writer.end(run)
        assert written.close() == data


def test_a_short_write_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random.Random(0).randbytes(6 * ALIGNMENT)
    written = Written(tmp_path / "file", len(data))
    through = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, block, offset: through(fd, block[:ALIGNMENT], offset))
    with DirectWriter(4 * TWO_BLOCKS, TWO_BLOCKS) as writer:
        run = started(writer, written.file, 0, len(data))
        run.put(memoryview(data))
        writer.end(run)
        assert written.close() == data


@pytest.fixture
def everything_direct(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Small tensors are written directly too, from small buffers; the list holds the bytes of each direct write."""
    (tmp_path / "probe").touch()
    os.close(opened_direct(tmp_path / "probe"))
    (tmp_path / "probe").unlink()
    monkeypatch.setattr(drafts, "SMALLEST_RUN_NBYTES", 1)
    monkeypatch.setattr("ckptbridge.converters.execute.DirectWriter", partial(DirectWriter, buffer_nbytes=TWO_BLOCKS))
    taken: list[int] = []
    through = DirectWriter.write

    def counted(self: DirectWriter, file: DirectFile, offset: int, buffer: mmap.mmap, nbytes: int) -> None:
        taken.append(nbytes)
        through(self, file, offset, buffer, nbytes)

    monkeypatch.setattr(DirectWriter, "write", counted)
    return taken


@pytest.mark.parametrize("to", ["torch_dist", "torch"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_conversion_writes_the_same_folder_both_ways(
    name: str, to: str, everything_direct: list[int], tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    made = []
    for is_direct in (False, True):
        target = tmp_path / str(is_direct) / "target"
        before = len(everything_direct)
        execute(planned(tiny_folder(name), target, to, direct_io=is_direct, workers=3))
        assert (len(everything_direct) > before) == is_direct
        back = target.with_name("back")
        execute(planned(target, back, "hf", direct_io=is_direct))
        made.append((digests(target), {n: d for n, d in (digests(back) or {}).items() if "receipt" not in n}))
    assert made[0][0] == made[1][0]
    assert made[0][1] == made[1][1]


def test_a_direct_conversion_that_was_stopped_goes_on(everything_direct: list[int], tmp_path: Path) -> None:
    source = write_sizable(tmp_path / "source")
    whole, resumed = tmp_path / "a" / "target", tmp_path / "b" / "target"
    options = {"max_file_size": 4 << 20, "direct_io": True, "workers": 2}
    execute(planned(source, whole, **options))
    descriptors = open_descriptors()
    with pytest.raises(Interrupted):
        execute(planned(source, resumed, **options), interrupt_after(10 << 20))
    assert partial_folder(resumed).exists()
    assert open_descriptors() == descriptors
    execute(planned(source, resumed, resume=True, **options))
    assert digests(resumed) == digests(whole)


def test_a_disk_that_breaks_during_a_direct_conversion_is_told(
    everything_direct: list[int], tiny_folder: TinyFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "ckptbridge.converters.drafts.open_direct", lambda path: os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    )
    descriptors = open_descriptors()
    with pytest.raises(StorageError, match=r"\.distcp: cannot be written: Bad file descriptor"):
        execute(planned(tiny_folder("llama"), tmp_path / "target", direct_io=True))
    assert not (tmp_path / "target").exists()
    assert open_descriptors() == descriptors


def test_what_fills_the_memory_is_written_directly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "available_nbytes", lambda: 1000)
    monkeypatch.setattr(direct, "is_on_a_disk", lambda folder: True)
    assert is_worth_it(tmp_path, 201)
    assert not is_worth_it(tmp_path, 200)
    monkeypatch.setattr(direct, "is_on_a_disk", lambda folder: False)
    assert not is_worth_it(tmp_path, 201)
    monkeypatch.undo()
    assert (direct.available_nbytes() or 0) > 1 << 20
    assert not direct.is_on_a_disk(Path("/proc"))


def test_what_counts_is_the_whole_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what this process has to write of it: ranks of one machine share its memory, and its page cache."""
    asked: list[int] = []
    monkeypatch.setattr("ckptbridge.converters.execute.is_worth_it", lambda folder, nbytes: asked.append(nbytes))
    source, options = write_sizable(tmp_path / "source"), {"max_file_size": 4 << 20, "workers": 2}
    plan = planned(source, tmp_path / "target", **options)
    with pytest.raises(Interrupted):
        execute(plan, interrupt_after(10 << 20))
    execute(planned(source, tmp_path / "target", resume=True, **options))
    assert asked == [plan.nbytes, plan.nbytes]


def test_the_plan_counts_the_buffers(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    for max_ram in (16 << 20, 1 << 30):
        cached = planned(tiny_folder("llama"), tmp_path / "target", max_ram=max_ram, direct_io=False)
        either = planned(tiny_folder("llama"), tmp_path / "target", max_ram=max_ram)
        assert either.options.direct_nbytes <= either.peak_ram <= max_ram
        assert cached.peak_ram <= max_ram
    assert either.peak_ram == cached.peak_ram + either.options.direct_nbytes
