"""Targets that exist, and whatever else lies where a conversion wants to write: nothing of others is lost."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.execute import execute, partial_folder
from ckptbridge.converters.model import open_model
from ckptbridge.converters.receipt import RECEIPT_NAME
from tests.conftest import TinyFolders
from tests.converters.crashing import digests
from tests.converters.running import Interrupted, interrupt_after, planned


def test_an_existing_target_is_refused_and_left_alone(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    target = tmp_path / "target"
    execute(planned(tiny_folder("llama"), target))
    before = digests(target)
    for options in ({}, {"resume": True}):
        with pytest.raises(BadInputError, match="already exists") as refused:
            execute(planned(tiny_folder("qwen2"), target, **options))
        assert str(target) in str(refused.value)
    assert digests(target) == before
    assert not partial_folder(target).exists()


@pytest.mark.parametrize("to", ["torch_dist", "hf"])
def test_overwrite_replaces_the_whole_folder(to: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    target = tmp_path / "target"
    execute(planned(tiny_folder("mixtral"), target, "hf"))
    (target / "left_over.txt").write_text("old")
    execute(planned(tiny_folder("llama"), target, to, overwrite=True))
    execute(planned(tiny_folder("llama"), tmp_path / "fresh", to))
    assert digests(target) == digests(tmp_path / "fresh")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "target"]


def test_overwrite_replaces_an_empty_folder(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    execute(planned(tiny_folder("llama"), tmp_path / "target", overwrite=True))
    assert (tmp_path / "target" / RECEIPT_NAME).exists()


def test_overwrite_keeps_a_folder_that_is_no_checkpoint(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    album = tmp_path / "album"
    album.mkdir()
    (album / "photo.jpg").write_bytes(b"a face")
    with pytest.raises(BadInputError, match="no checkpoint"):
        execute(planned(tiny_folder("llama"), album, overwrite=True))
    assert (album / "photo.jpg").read_bytes() == b"a face"


def test_overwrite_keeps_a_file_that_is_no_folder(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    file = tmp_path / "thesis.txt"
    file.write_text("years of work")
    with pytest.raises(BadInputError, match=r"thesis\.txt"):
        execute(planned(tiny_folder("llama"), file, overwrite=True))
    assert file.read_text() == "years of work"


def test_overwrite_keeps_the_source(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = tmp_path / "models" / "source"
    shutil.copytree(tiny_folder("llama"), source)
    (tmp_path / "models" / "config.json").write_text("{}")  # so that it looks like a checkpoint
    link = tmp_path / "link"
    link.symlink_to(source)
    before = digests(source)
    for target in (source, source / ".." / "source", link, tmp_path / "models"):
        with pytest.raises(BadInputError, match="source"):
            execute(planned(source, target, "hf", overwrite=True))
        with pytest.raises(BadInputError, match="source"):
            execute(planned(link, target, "torch_dist", overwrite=True))
    assert digests(source) == before


def test_a_target_within_the_source_is_refused_or_can_be_resumed(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_folder("llama"), source)
    before, target = digests(source), source / "mcore"
    try:
        execute(planned(source, target), interrupt_after(100_000))
    except Interrupted:
        execute(planned(source, target, resume=True))
        assert open_model(target).config == open_model(source).config
        shutil.rmtree(target)
    except BadInputError as refused:
        assert "within the source" in str(refused)  # noqa: PT017
    assert digests(source) == before


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}], ids=str)
@pytest.mark.parametrize("name", ["target.partial", "target.replaced"])
def test_a_folder_of_somebody_elses_beside_the_target_is_kept(
    name: str, options: dict[str, Any], tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    """These names are ours only where we made the folder."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("years of work")
    with contextlib.suppress(BadInputError):
        execute(planned(tiny_folder("llama"), tmp_path / "target", **options))
    assert (tmp_path / name / "thesis.txt").read_text() == "years of work"


def test_overwriting_through_a_link_ends_whole(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    """Either refused beforehand, or done: never an error behind the change."""
    execute(planned(tiny_folder("qwen2"), tmp_path / "real"))
    before, link = digests(tmp_path / "real"), tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    try:
        execute(planned(tiny_folder("llama"), link, overwrite=True))
    except BadInputError:
        assert link.is_symlink()
        assert digests(tmp_path / "real") == before
    else:
        execute(planned(tiny_folder("llama"), tmp_path / "fresh"))
        assert digests(link) == digests(tmp_path / "fresh")
        assert not (tmp_path / "link.replaced").is_symlink()


@pytest.mark.parametrize("options", [{}, {"overwrite": True}], ids=str)
@pytest.mark.parametrize("target", [".", "..", "/", "sub/.."])
def test_a_target_without_a_name_is_refused(
    target: str, options: dict[str, Any], tiny_folder: TinyFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(BadInputError):
        execute(planned(tiny_folder("llama").resolve(), Path(target), **options))


def test_a_target_that_looks_unfinished_by_its_name_is_refused_or_readable(
    tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    target = tmp_path / "model.partial"
    try:
        execute(planned(tiny_folder("llama"), target))
    except BadInputError:
        assert not any(tmp_path.iterdir())
    else:
        assert open_model(target).family.name == "llama"
