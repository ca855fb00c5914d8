"""One process a run folder, for as long as it lives."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.file_lock import lock
from ckptbridge.trainer.run_lock import LOCK_NAME, only_one
from tests.trainer.tiny_runs import recipe_values, run, save_model


def test_a_second_run_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    """A killed process leaves the file, but no lock."""
    save_model(tmp_path, "llama_tied")
    values = recipe_values(tmp_path, "llama_tied", "run")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "ckptbridge.trainer", str(tmp_path / "recipe.yaml")]
    command += ["--set", "schedule.total_steps=100000"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout
        try:
            for _ in range(5):
                process.stdout.readline()
            with pytest.raises(BadInputError) as refused:
                run(values)
        finally:
            process.kill()
    assert f"{tmp_path / 'run'}: another process ({process.pid} on " in str(refused.value)
    assert "trains in this folder already; wait for it, end it, or name another run_folder" in str(refused.value)
    assert (tmp_path / "run" / LOCK_NAME).exists()
    assert run(values).resumed_from >= 2
    assert not (tmp_path / "run" / LOCK_NAME).exists()


def test_the_lock_ends_with_what_it_was_taken_for(tmp_path: Path) -> None:
    def inner() -> None:
        with only_one(tmp_path):
            raise ValueError("within")

    for _ in range(2):
        with pytest.raises(ValueError, match="within"):
            inner()
    with only_one(tmp_path), pytest.raises(BadInputError, match="trains in this folder already"):
        inner()
    assert list(tmp_path.iterdir()) == []


def test_where_there_are_no_locks_nothing_is_locked(tmp_path: Path) -> None:
    """A descriptor that only names a file cannot be locked, as on a file system without locks."""
    (tmp_path / "file").touch()
    one, other = (os.open(tmp_path / "file", os.O_RDWR) for _ in range(2))
    path_only = os.open(tmp_path / "file", os.O_PATH)
    try:
        assert lock(one)
        with pytest.raises(BlockingIOError):
            lock(other)
        assert not lock(path_only)
    finally:
        for descriptor in (one, other, path_only):
            os.close(descriptor)


def test_never_two_at_once_though_each_removes_the_file(tmp_path: Path) -> None:
    """Without the look at the name, one that opened the file before it was removed would lock what nobody sees."""
    inside, most, entered = [0], [0], [0]

    def worker(_: int) -> None:
        for _ in range(300):
            try:
                with only_one(tmp_path):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    entered[0] += 1
                    tmp_path.stat()  # another thread may run here
                    inside[0] -= 1
            except BadInputError:
                continue

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(worker, range(8)))
    assert most[0] == 1
    assert entered[0] > 50
