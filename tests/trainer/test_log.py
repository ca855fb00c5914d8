"""train.jsonl: JSON and nothing else, whatever a step came to and however the run before ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ckptbridge.converters.errors import BadInputError
from ckptbridge.trainer.log import StepLog, read_log

RECORDS: list[dict[str, Any]] = [
    {"step": step, "loss": 3.0 - step, "expert_load": {"layers": [0], "min": [0.1]}} for step in (1, 2, 3)
]


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def written(path: Path) -> Path:
    log = StepLog(path, 0)
    for record in RECORDS:
        log.write(record)
    return path


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    path = written(tmp_path / "log")
    assert read_log(path) == RECORDS
    assert read_log(tmp_path / "absent") == []
    before = path.read_bytes()
    StepLog(path, 3)
    assert path.read_bytes() == before
    StepLog(path, 2)
    assert read_log(path) == RECORDS[:2]


def test_what_is_no_number_is_written_as_null(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "log", 0)
    record = {"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "load": {"min": [-float("inf"), 0.5]}}
    told = log.write(record)
    line = json.loads((tmp_path / "log").read_text(), parse_constant=refuse_constant)
    assert line == told == {"step": 1, "loss": None, "grad_norm": None, "load": {"min": [None, 0.5]}}


def test_a_log_that_holds_nan_is_made_json(tmp_path: Path) -> None:
    (tmp_path / "log").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": Infinity}\n')
    StepLog(tmp_path / "log", 2)
    lines = [json.loads(line, parse_constant=refuse_constant) for line in (tmp_path / "log").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": None}, {"step": 2, "loss": None}]


@pytest.mark.parametrize("cut", ["}", "]", '"loss"', "{"])
def test_a_last_line_that_a_killed_run_left_does_not_count(cut: str, tmp_path: Path) -> None:
    """Wherever it was cut: behind a brace that closes something within the record, too."""
    path = written(tmp_path / "log")
    record = json.dumps({"step": 4, "expert_load": {"min": [0.1]}, "loss": 3.0, "more": {"a": 1}, "last": 0})
    with path.open("a") as file:
        file.write(record[: record.rindex(cut, 0, -1) + 1])
    assert read_log(path) == RECORDS
    StepLog(path, 3).write({"step": 4})
    assert read_log(path) == [*RECORDS, {"step": 4}]


@pytest.mark.parametrize("damage", [b"\xff\x00\xfe", b"[1, 2]", b'{"loss": 1}', b""])
def test_a_damaged_line_within_the_log_is_named(damage: bytes, tmp_path: Path) -> None:
    path = written(tmp_path / "log")
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], damage, lines[2], b""]))
    before = path.read_bytes()
    with pytest.raises(BadInputError, match=r"log: line 2 is no record of a step, expected .*; delete this line"):
        StepLog(path, 3)
    assert path.read_bytes() == before
