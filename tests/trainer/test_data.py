"""Text to batches: what is read, what is held out, that nothing leaks, and that the order can be taken up again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from ckptbridge.converters.errors import BadInputError
from ckptbridge.trainer.data import TokenStream, held_out_batches
from ckptbridge.trainer.documents import Documents
from ckptbridge.trainer.recipe import DataSection
from ckptbridge.trainer.tokens import Tokens, load_tokenizer, tokenize
from tests.trainer.text import END, save_tokenizer, write_documents


def section(*text: Path, **options: Any) -> DataSection:
    return DataSection(text=[str(path) for path in text], **{"sequence_length": 8, "held_out_fraction": 0.2, **options})


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerFast:
    save_tokenizer(tmp_path / "tokenizer")
    return load_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "texts")


def tokens_of(count: int, held_out: int = 0) -> Tokens:
    return Tokens(train=np.arange(count), held_out=np.arange(held_out), digest=f"{count}")


def decoded(ids: np.ndarray, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The documents of a flat file of tokens."""
    documents, document = [], []
    for token in ids.tolist():
        if token == END:
            documents.append(tokenizer.decode(document).replace(" ", ""))
            document = []
        else:
            document.append(token)
    assert not document
    return documents


def test_tokens_are_the_documents_and_held_out_ones_never_meet_training(
    texts: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokens = tokenize(Documents(section(texts)), tokenizer, 250, tmp_path / "tokens")
    train, held_out = decoded(tokens.train, tokenizer), decoded(tokens.held_out, tokenizer)
    written = [path.read_text().replace(" ", "") for path in texts.iterdir()]
    assert sorted(train + held_out) == sorted(written)
    assert len(held_out) == 4
    assert not set(train) & set(held_out)


def test_equal_documents_are_on_one_side(texts: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for path in list(texts.iterdir()):
        path.with_name("copy of " + path.name).write_bytes(path.read_bytes())
    tokens = tokenize(Documents(section(texts)), tokenizer, 250, tmp_path / "tokens")
    train, held_out = decoded(tokens.train, tokenizer), decoded(tokens.held_out, tokenizer)
    assert (len(train), len(held_out)) == (32, 8)
    assert not set(train) & set(held_out)


def test_the_seed_draws_order_and_split(texts: Path) -> None:
    one, again, other = (Documents(section(texts, seed=seed)) for seed in (1, 1, 2))
    assert list(one) == list(again) != list(other)
    assert one.held_out() == again.held_out() != other.held_out()


def test_limits(texts: Path) -> None:
    assert len(list(Documents(section(texts, max_documents=7)))) == 7
    taken = list(Documents(section(texts, max_bytes=1000)))
    assert 1000 <= sum(map(len, taken)) < 1000 + 400
    assert taken == list(Documents(section(texts)))[: len(taken)]


def test_files_globs_folders_and_what_is_no_text(tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    (folder / "deep" / "b.md").write_text("b")
    (folder / "latin.txt").write_bytes("ä".encode("latin-1"))
    (folder / "zeros.bin").write_bytes(b"\0\1")
    (folder / "blank.txt").write_text(" \n")
    assert sorted(Documents(section(folder))) == ["a", "b"]
    assert sorted(Documents(section(folder / "**" / "*.md", folder / "a.txt", folder / "*.txt"))) == ["a", "b"]
    for name, said in (("latin.txt", "no UTF-8"), ("zeros.bin", "binary")):
        with pytest.raises(BadInputError, match=f"{name}.*{said}"):
            list(Documents(section(folder / name)))
    with pytest.raises(BadInputError, match="nowhere"):
        Documents(section(folder / "nowhere*"))


def test_what_lies_in_the_run_folder_is_no_text_unless_it_is_named(texts: Path) -> None:
    run = texts / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "recipe.yaml").write_text("seed: 1")
    (run / "checkpoints" / "note.txt").write_text("of the run")
    (texts / "runs.txt").write_text("not below it")
    for folder in (run, texts / "deep" / ".." / "run"):
        (texts / "deep").mkdir(exist_ok=True)
        files = [file.path for file in Documents(section(texts, texts / "**" / "*.txt"), folder).files]
        assert len(files) == 21
        assert not [path for path in files if path.is_relative_to(run)]
    named = Documents(section(texts, run / "recipe.yaml"), run).files
    assert [file.path for file in named if file.named] == [run / "recipe.yaml"]
    assert len(Documents(section(texts)).files) == 23
    with pytest.raises(BadInputError, match=r"all 2 files of .*run.* lie below run_folder .*name another run_folder"):
        Documents(section(texts, run), run)


def test_files_that_are_passed_over_are_counted_and_told_again_from_the_folder(
    texts: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    assert tokenize(Documents(section(texts)), tokenizer, 250, tmp_path / "all").note is None
    (texts / "latin.txt").write_bytes("ä".encode("latin-1"))
    (texts / "zeros.bin").write_bytes(b"\0\1")
    said = "data.text: 2 of 22 files found were passed over: they are no UTF-8 text."
    for _ in range(2):
        assert tokenize(Documents(section(texts)), tokenizer, 250, tmp_path / "tokens").note == said


def test_a_single_document_is_cut_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("one\n\ntwo\n\nthree")
    assert list(Documents(section(path, document_separator="\n\n"))) == ["one", "two", "three"]
    with pytest.raises(BadInputError, match="document_separator"):
        Documents(section(path)).held_out()
    assert Documents(section(path, held_out_fraction=0.0)).held_out() == frozenset()


def test_tokens_are_made_once_and_again_when_the_text_changes(
    texts: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = tmp_path / "tokens"
    first = tokenize(Documents(section(texts)), tokenizer, 250, folder)
    stamp = (folder / "train.bin").stat().st_mtime_ns
    assert tokenize(Documents(section(texts)), tokenizer, 250, folder).digest == first.digest
    assert (folder / "train.bin").stat().st_mtime_ns == stamp
    (texts / "00.txt").write_text("another text")
    changed = tokenize(Documents(section(texts)), tokenizer, 250, folder)
    assert changed.digest != first.digest
    assert tokenize(Documents(section(texts, seed=5)), tokenizer, 250, folder).digest != changed.digest


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "\xff" + text,
        lambda text: text.replace('"digest"', '"other"'),
        lambda text: text.replace('"<u2"', '"<f9"'),
        lambda text: text.replace('"held_out": ', '"held_out": -'),
        lambda text: text.replace('"key": "', '"key": 1, "was": "'),
        lambda text: "[" * 100_000,
    ],
)
def test_a_damaged_index_is_made_anew(
    damage: Callable[[str], str], texts: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = tmp_path / "tokens"
    before = tokenize(Documents(section(texts)), tokenizer, 250, folder)
    index = (folder / "index.json").read_text()
    assert damage(index) != index
    (folder / "index.json").write_text(damage(index), encoding="latin-1")
    after = tokenize(Documents(section(texts)), tokenizer, 250, folder)
    assert after.digest == before.digest
    assert np.array_equal(after.train, before.train)
    assert (folder / "index.json").read_text() == index


def test_a_truncated_token_file_is_refused(texts: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    tokenize(Documents(section(texts)), tokenizer, 250, folder)
    with (folder / "train.bin").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(BadInputError, match=r"train\.bin: has 100 bytes, but .*index\.json tells of \d+; delete"):
        tokenize(Documents(section(texts)), tokenizer, 250, folder)
    (folder / "train.bin").unlink()
    with pytest.raises(BadInputError, match=r"train\.bin: is missing, but .*index\.json tells of \d+; delete"):
        tokenize(Documents(section(texts)), tokenizer, 250, folder)


def test_a_tokenizer_of_another_model_is_refused(
    texts: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(BadInputError, match="the model has 50 words"):
        tokenize(Documents(section(texts)), tokenizer, 50, tmp_path / "tokens")
    with pytest.raises(BadInputError, match="no tokenizer"):
        load_tokenizer(texts)


def test_an_epoch_predicts_every_token_once_and_orders_differ() -> None:
    stream = TokenStream(tokens_of(8 * 13 + 5), section(Path("x"), seed=3))
    assert stream.sequences == 13
    epochs = [torch.cat([stream.next(1) for _ in range(13)]) for _ in range(2)]
    for epoch in epochs:
        assert epoch.shape == (13, 9)
        assert sorted(epoch[:, 1:].flatten().tolist()) == list(range(1, 8 * 13 + 1))
        assert (epoch[:, 1:] == epoch[:, :-1] + 1).all()
    assert epochs[0].tolist() != epochs[1].tolist()
    assert epochs[0].tolist() != TokenStream(tokens_of(109), section(Path("x"), seed=4)).next(13).tolist()


@pytest.mark.parametrize("taken", [0, 1, 12, 13, 40])
def test_a_stream_continues_exactly(taken: int) -> None:
    options = section(Path("x"), seed=3)
    stream, other = TokenStream(tokens_of(109), options), TokenStream(tokens_of(109), options)
    stream.next(taken) if taken else None
    state = stream.state_dict()
    other.next(5)
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert all(torch.equal(stream.next(3), other.next(3)) for _ in range(10))


@pytest.mark.parametrize(
    ("tokens", "options", "said"),
    [(200, {}, "the text"), (109, {"seed": 9}, "data.seed"), (109, {"sequence_length": 4}, "data.sequence_length")],
)
def test_a_stream_does_not_continue_on_other_data(tokens: int, options: dict[str, Any], said: str) -> None:
    state = TokenStream(tokens_of(109), section(Path("x"))).state_dict()
    other = TokenStream(tokens_of(tokens), section(Path("x"), **options))
    with pytest.raises(BadInputError, match=said):
        other.load_state_dict(state)


def test_held_out_batches_are_the_same_first_ones() -> None:
    options = section(Path("x"), micro_batch_size=2, global_batch_size=2)
    batches = held_out_batches(tokens_of(9, held_out=8 * 5 + 1), options, batches=2)
    assert [batch[:, 0].tolist() for batch in batches] == [[0, 8], [16, 24]]
    assert [len(b) for b in held_out_batches(tokens_of(9, held_out=8 * 5 + 1), options, batches=9)] == [2, 2, 1]
    assert held_out_batches(tokens_of(9), section(Path("x"), held_out_fraction=0.0), batches=2) == []


def test_too_little_text_is_refused() -> None:
    with pytest.raises(BadInputError, match="8 tokens, too few"):
        TokenStream(tokens_of(8), section(Path("x")))
    with pytest.raises(BadInputError, match="held-out documents have 8 tokens"):
        held_out_batches(tokens_of(99, held_out=8), section(Path("x")), batches=1)
