"""Text to train on: a tokenizer of single characters that fits the tiny models, and documents of their own words."""

from __future__ import annotations

import random
from pathlib import Path

from transformers import PreTrainedTokenizerFast

END, UNKNOWN = 2, 3
LETTERS = "\n" + "".join(map(chr, range(32, 127)))


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Write a tokenizer with a token a character (ids 4 to 99), and end-of-sequence token 2."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split

    vocabulary = {"<end>": END, "<unknown>": UNKNOWN} | {letter: i for i, letter in enumerate(LETTERS, 4)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unknown>")
    fast.save_pretrained(folder)
    return fast


def write_documents(folder: Path, count: int = 20, words: int = 60) -> Path:
    """Write `count` files of words, each drawn from a vocabulary of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        draw = random.Random(number)
        vocabulary = ["".join(draw.choices("abcdefghij", k=4)) for _ in range(8)]
        (folder / f"{number:02}.txt").write_text(f"[{number:02}] " + " ".join(draw.choices(vocabulary, k=words)))
    return folder
