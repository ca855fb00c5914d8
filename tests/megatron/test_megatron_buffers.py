"""The flat buffers of the distributed optimizer, against megatron-core's own function on random parameters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ckptbridge.converters.mcore.optimizer import buffers as optimizer_buffers
from ckptbridge.converters.mcore.optimizer.buffers import Flat, buffer_layout
from tests.fetch_megatron import FOLDER as MEGATRON
from tests.megatron.launch import check_fetched

pytestmark = [pytest.mark.mcore, pytest.mark.xdist_group("megatron_optimizer")]

COUNT = 1000


@pytest.fixture(scope="module")
def layouts() -> list[dict[str, Any]]:
    check_fetched()
    environment = os.environ | {"PYTHONPATH": str(MEGATRON), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(Path(__file__).with_name("buffer_layouts.py")), str(COUNT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def agreeing(layouts: list[dict[str, Any]]) -> int:
    return sum(
        buffer_layout([Flat(numel, alone=shared) for numel, shared in made["parameters"]], made["bucket_size"])
        == (made["starts"], made["total"])
        for made in layouts
    )


def test_parameters_begin_where_megatron_lays_them(layouts: list[dict[str, Any]]) -> None:
    """With any number of data-parallel ranks and any padding of buckets: neither shows in what is saved."""
    assert agreeing(layouts) == COUNT


@pytest.mark.parametrize("alignment", [1, 32, 128])
def test_another_alignment_shows(
    alignment: int, layouts: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer_buffers, "_ALIGNMENT", alignment)
    assert agreeing(layouts) < COUNT // 2
