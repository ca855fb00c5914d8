"""A run whose text holds its own run folder: it trains on what was there before it, again and again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ckptbridge.trainer.loop import train
from ckptbridge.trainer.recipe_file import parse_recipe
from tests.tiny import save_tiny
from tests.trainer.text import save_tokenizer, write_documents


def test_a_run_does_not_train_on_its_own_files_and_goes_on(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    texts = write_documents(tmp_path / "texts")
    (texts / "latin.txt").write_bytes("ä".encode("latin-1"))
    values: dict[str, Any] = {
        "run_folder": str(texts / "run"),
        "model": {"init_from": str(tmp_path / "model")},
        "data": {"text": [str(texts)], "sequence_length": 16, "global_batch_size": 2},
        "schedule": {"total_steps": 2},
        "checkpoint": {"save_every": 1},
        "moe": {"aux_loss_coeff": 0.0},
        "export": {"hf": False},
        "threads": 1,
    }
    for _ in range(2):
        early: list[str] = []
        result = train(parse_recipe(values), on_note=early.append)
        assert early
        assert set(early) <= set(result.notes)
        assert "data.text: 1 of 21 files found were passed over: they are no UTF-8 text." in result.notes
        assert any(note.startswith("Nothing balances the experts: moe.aux_loss_coeff is 0") for note in result.notes)
        index = json.loads((texts / "run" / "tokens" / "index.json").read_text())
        assert (index["files"], index["passed_over"]) == (21, 1)
    assert result.resumed_from == 2
