"""Tokenizers that know no words: transformers makes one of a folder without their files, and text becomes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ckptbridge.converters.errors import BadInputError
from ckptbridge.trainer.documents import Documents
from ckptbridge.trainer.recipe import DataSection
from ckptbridge.trainer.text_ids import tokenized
from ckptbridge.trainer.tokens import load_tokenizer, tokenize
from tests.trainer.text import write_documents

WORDS = {"a": 0, "b": 1, "ab": 2, "Ġ": 3, "Ġab": 4}
MERGES = "#version: 0.2\na b\nĠ ab\n"
THINK = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
ADDED = {"5": {"content": "<think>", "special": False, **THINK}, "6": {"content": "<end>", "special": True, **THINK}}
"""As Qwen3's: tokens that stand in tokenizer_config.json beside the vocabulary, and not all of them special."""


def folder_of(place: Path, model_type: str, **files: str) -> Path:
    place.mkdir()
    (place / "config.json").write_text(json.dumps({"model_type": model_type}))
    for name, text in files.items():
        (place / name.replace("__", ".")).write_text(text)
    return place


def configured(tokenizer_class: str) -> str:
    told: dict[str, Any] = {"tokenizer_class": tokenizer_class, "eos_token": "<end>", "added_tokens_decoder": ADDED}
    return json.dumps(told)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "gemma2"])
@pytest.mark.parametrize("has_config", [True, False])
def test_one_without_a_vocabulary_is_refused(model_type: str, has_config: bool, tmp_path: Path) -> None:
    name = "GemmaTokenizer" if model_type == "gemma2" else "Qwen2Tokenizer"
    files = {"tokenizer_config__json": configured(name)} if has_config else {}
    folder = folder_of(tmp_path / "model", model_type, **files)
    empty = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert set(empty("ab ab", add_special_tokens=False)["input_ids"]) <= {empty.unk_token_id}
    for load in (lambda: load_tokenizer(folder), lambda: tokenized(folder, "ab ab", 250)):
        with pytest.raises(BadInputError) as caught:
            load()
        text = str(caught.value)
        assert text.startswith(f"{folder}: its tokenizer ({name}) has no vocabulary but special tokens; not there: ")
        assert "tokenizer.json" in text
        assert ("vocab.json, merges.txt" in text) == (model_type != "gemma2")
        assert "data.tokenizer" in text


def test_one_with_its_vocabulary_is_taken(tmp_path: Path) -> None:
    files = {"tokenizer_config__json": configured("Qwen2Tokenizer"), "merges__txt": MERGES}
    folder = folder_of(tmp_path / "model", "qwen2", vocab__json=json.dumps(WORDS), **files)
    assert load_tokenizer(folder)("ab ab", add_special_tokens=False)["input_ids"] == [2, 4]
    (folder / "merges.txt").unlink()
    with pytest.raises(BadInputError, match="no tokenizer can be loaded"):
        load_tokenizer(folder)


def test_one_that_makes_nothing_of_the_text_is_refused(tmp_path: Path) -> None:
    """Letters of another script and no token for unknown ones: only ends of documents would be trained on."""
    texts = write_documents(tmp_path / "texts")
    documents = Documents(DataSection(text=[str(texts)], sequence_length=8))
    models = {
        "letters": (BPE({"<end>": 0, "д": 1}, []), r"letters: the tokenizer makes no token of any document.*"),
        "words": (WordLevel({"<end>": 0, "дом": 1}), r"words: the tokenizer fails: WordLevel error: Missing \[UNK\].*"),
    }
    for name, (model, said) in models.items():
        fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="<end>")
        fast.save_pretrained(tmp_path / name)
        with pytest.raises(BadInputError, match=said + r"data\.tokenizer names another folder"):
            tokenize(documents, load_tokenizer(tmp_path / name), 250, tmp_path / "tokens")
