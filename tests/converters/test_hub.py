"""A Hub id is downloaded, a folder never is, and without a network the failure is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptbridge.converters.errors import BadInputError, StorageError
from ckptbridge.converters.hub.source import local_folder


def test_a_folder_is_itself_even_when_it_looks_like_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert local_folder("org/name") == Path("org/name")
    assert local_folder(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("source", ["nowhere", "/nowhere/at/all", "../up", "a/b/c", "org/", "org/na me", "~/model"])
def test_what_is_neither_a_folder_nor_a_hub_id_is_bad_input(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "..")
    with pytest.raises(BadInputError, match="no such folder"):
        local_folder(source)


def test_an_id_that_is_not_here_cannot_be_had_offline() -> None:
    with pytest.raises(StorageError, match="ckptbridge-tests/not-there") as failed:  # the tests set HF_HUB_OFFLINE
        local_folder("ckptbridge-tests/not-there")
    assert failed.value.exit_code == 4
