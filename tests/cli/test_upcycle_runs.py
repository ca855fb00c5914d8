"""`upcycle` around its long work: what it refuses before anything is trained, what it leaves alone, what it reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_upcycle import deviation, run, shown
from tests.tiny import save_tiny
from tests.trainer.text import save_tokenizer


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer of a token a character."""
    folder = save_tiny("llama", tmp_path_factory.mktemp("upcycle") / "llama")
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_report_is_of_the_weights_that_are_written(dtype: str, dense: Path, tmp_path: Path) -> None:
    words = (dense, tmp_path / "moe", "--num-experts", 8, "--topk", 4, "--granularity", 4, "--dtype", dtype)
    told = json.loads(run(*words, "--json").stdout)["report"]
    found = deviation(tmp_path / "moe", dense)
    assert found > 1e-4
    assert told["logits"][0]["max_relative_difference"] == pytest.approx(found, rel=3)
    assert told["rounded"]["max_relative_difference"] < 1e-5
    said = shown(run(*words, "--overwrite"))
    assert f"virtual-group is exact for the source rounded to {dtype}" in said
    assert f"that is the rounding to {dtype}" in said


DISTIL = ("--num-experts", 4, "--method", "split", "--distill-tokens", 1500)


def test_a_folder_of_the_users_is_no_scratch(dense: Path, tmp_path: Path) -> None:
    run(dense, tmp_path / "moe.distilled", "--num-experts", 4, "--no-probe")
    held = {path: path.read_bytes() for path in (tmp_path / "moe.distilled").iterdir()}
    said = shown(run(dense, tmp_path / "moe", *DISTIL, code=3))
    assert "moe.distilled: holds" in said
    assert "name another target" in said
    assert {path: path.read_bytes() for path in (tmp_path / "moe.distilled").iterdir()} == held
    assert [path.name for path in tmp_path.iterdir()] == ["moe.distilled"]


CHEAP: dict[str, tuple[tuple[object, ...], str]] = {
    "a layout that does not fit": (("--to", "mcore", "--tp", 3), "tp = 3 does not divide num_attention_heads = 8"),
    "an empty text of the report": (("--probe", "{tmp}/empty.txt"), "has 0 tokens"),
    "a class that does not fit": (("--to", "qwen3_moe"), "qk_layernorm"),
    "a receipt without a folder": (("--receipt", "{tmp}/none/receipt.json"), "there is no folder"),
    "an earlier run": (("--to", "mcore"), "is left of an earlier run"),
    "a short text": (("--distill-text", "{tmp}/short.txt"), "distillation needs at least 4"),
    "few tokens": (("--distill-tokens", 2), "it must be at least 3"),
}


@pytest.mark.parametrize("name", CHEAP)
def test_what_can_be_refused_at_once_is_refused_before_anything_is_trained(
    name: str, dense: Path, tmp_path: Path
) -> None:
    flags, word = CHEAP[name]
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("abc")
    if name == "an earlier run":
        (tmp_path / "moe.partial").mkdir()
        (tmp_path / "moe.partial" / "half").write_text("of a file")
    before = sorted(tmp_path.rglob("*"))
    words = [str(flag).format(tmp=tmp_path) for flag in flags]
    said = shown(run(dense, tmp_path / "moe", *DISTIL, *words, code=3))
    assert word in said, said
    assert sorted(tmp_path.rglob("*")) == before
