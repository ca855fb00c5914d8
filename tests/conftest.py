"""What every test may use: tiny models, saved once a session; and a quiet, offline transformers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: the machine has other work
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

from tests.tiny import save_tiny

TinyFolders = Callable[[str], Path]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> TinyFolders:
    """`tiny_folder(name)` is the fp32 Hugging Face folder of TINY[name]. Read it, never write into it."""
    saved: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in saved:
            saved[name] = save_tiny(name, tmp_path_factory.mktemp("tiny") / name)
        return saved[name]

    return folder
