"""What a user is told who stopped a verb, or whose disk is full: only flags that the verb has."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
from typer.testing import CliRunner, Result

from ckptbridge.cli import app
from ckptbridge.converters.disk import disk_message
from tests.conftest import TinyFolders


def interrupted(monkeypatch: pytest.MonkeyPatch, stopped: str, *words: object) -> Result:
    """A verb that is stopped in the function `stopped`."""

    def stop(*_: Any, **__: Any) -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stopped, stop)
        done = CliRunner().invoke(app, [*map(str, words)])
    assert done.exit_code == 130, done.output
    return done


def test_a_training_run_that_was_stopped_is_resumed_by_the_same_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    values = {
        "run_folder": str(tmp_path / "run"),
        "model": {"init_from": "somewhere"},
        "data": {"text": ["nowhere"]},
        "schedule": {"total_steps": 1},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    done = interrupted(monkeypatch, "ckptbridge.trainer.loop.train", "train", tmp_path / "recipe.yaml")
    assert "the same command resumes from the run folder's newest checkpoint" in done.stderr
    assert "--resume" not in done.output


def test_a_conversion_that_was_stopped_is_resumed_by_its_flag(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stopped = "ckptbridge.converters.hub.source.open_source"
    done = interrupted(monkeypatch, stopped, "hf2mcore", tmp_path / "source", tmp_path / "target")
    assert "run again with --resume" in done.stderr


def test_a_verb_that_resumes_nothing_does_not_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for stopped, *words in (
        ("ckptbridge.converters.hub.source.open_source", "inspect", tmp_path / "source"),
        ("ckptbridge.demo.story.run_demo", "demo", "--folder", tmp_path / "demo"),
    ):
        done = interrupted(monkeypatch, stopped, *words)
        assert done.stderr.strip() == "error: interrupted"


def test_a_full_disk_names_the_flag_for_conversions_alone() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    said = disk_message(Path("runs/x/checkpoints/iter_0000002.partial/__0_0.distcp"), full)
    assert "the disk is full. What was written lies in runs/x/checkpoints/iter_0000002.partial" in said
    assert "conversions continue with --resume, a training run of the same recipe by itself" in said
    other = disk_message(Path("a/b"), OSError(errno.EIO, "Input/output error"))
    assert other == "a/b: cannot be written: Input/output error"


def unread(*words: object) -> subprocess.CompletedProcess[str]:
    """A verb whose output nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [sys.executable, "-m", "ckptbridge", *map(str, words)]
        return subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writer)


def test_a_verb_whose_reader_left_is_no_success(tiny_folder: TinyFolders) -> None:
    """With pipefail a verification that failed would have passed."""
    done = unread("verify", tiny_folder("llama"), tiny_folder("llama_tied"), "--json")
    assert done.returncode == 141, done.stderr


def test_an_error_keeps_its_exit_code_though_nobody_reads_its_json(tmp_path: Path) -> None:
    done = unread("hf2mcore", tmp_path / "nothere", tmp_path / "out", "--json")
    assert done.returncode == 3
    assert "nothere" in done.stderr
