"""The text that checkpoints are run on, as token ids: a given one, the built-in one, or drawn ids.

Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.model import Model
from ckptbridge.trainer.tokens import load_tokenizer

_BUILT_IN = Path(__file__).with_name("verify_text.txt")


def text_ids(models: Sequence[Model], text: str | None, tokens: int | None) -> tuple[Tensor, str]:
    """The first `tokens` ids [T] of a text (None: all), and which text it was.

    Without a text it is the Apache-2.0 licence. The first model that has a tokenizer gives it; no BOS is added. Where
    none has one, ids are drawn with a fixed seed. Raises BadInputError for a text without a tokenizer, a text of less
    than two tokens, and ids that the first model does not know.
    """
    folder = tokenizer_folder(models)
    if folder is None:
        if text is not None:
            paths = ", ".join(str(model.path) for model in models)
            raise BadInputError(f"none of {paths} has a tokenizer beside it, so no text can be given")
        generator = torch.Generator().manual_seed(0)
        count = 1024 if tokens is None else tokens
        return torch.randint(models[0].config.vocab_size, (count,), generator=generator), "token ids drawn with seed 0"
    described = "the text given" if text is not None else "the Apache-2.0 licence"
    text = _BUILT_IN.read_text(encoding="utf-8") if text is None else text
    ids_T = tokenized(folder, text, models[0].config.vocab_size)[:tokens]
    if len(ids_T) < 2:
        raise BadInputError(f"{described} has {len(ids_T)} tokens: at least 2 are needed to predict one")
    return ids_T, described


def tokenizer_folder(models: Sequence[Model]) -> Path | None:
    """The folder of the first tokenizer that one of the models has beside it."""
    assets = (asset for model in models for asset in model.assets)
    return next((asset.parent for asset in assets if asset.name.startswith("tokenizer")), None)


def tokenized(folder: Path, text: str, vocab_size: int) -> Tensor:
    """All ids [T] of a text, none added. Raises BadInputError for an id that the model has no word for."""
    ids = load_tokenizer(folder)(text, add_special_tokens=False)["input_ids"]
    if ids and max(ids) >= vocab_size:
        raise BadInputError(f"{folder}: its tokenizer makes token {max(ids)}, but the models have {vocab_size} words")
    return torch.tensor(ids, dtype=torch.int64)


def read_text(path: Path) -> str:
    """A text file; bytes that are no UTF-8 become replacement characters. Raises BadInputError if it is not there."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise BadInputError(f"{path}: the text cannot be read: {error.strerror}") from error


def windows(ids_T: Tensor, length: int) -> list[Tensor]:
    """The ids cut into sequences of `length` tokens, the last one shorter; a last one of one token is left out."""
    return [part for part in ids_T.split(length) if len(part) > 1]
