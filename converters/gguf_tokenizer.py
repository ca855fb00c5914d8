"""The tokenizer inside a GGUF file, as the two files that `AutoTokenizer.from_pretrained` loads.

Byte-level BPE only: the vocabulary and the merges are in the metadata, and a one-word name stands for the
rule that cuts text into words before merging. The names are llama.cpp's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ckptbridge.converters.errors import BadInputError, NotSupportedError

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_EVERY_DIGIT_ALONE = {"type": "Digits", "individual_digits": True}
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": _BYTE_LEVEL,
    "llama-bpe": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": _LLAMA3_WORDS}, "behavior": "Isolated", "invert": False},
            {**_BYTE_LEVEL, "use_regex": False},
        ],
    },
    "smollm": {"type": "Sequence", "pretokenizers": [_EVERY_DIGIT_ALONE, _BYTE_LEVEL]},
}
_SAME_RULE = {
    "gpt2": "gpt-2",
    "olmo": "gpt-2",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "starcoder": "smollm",
}
_ADDS_BOS_UNLESS_TOLD = ("llama-bpe",)  # llama.cpp's own default for files that leave the key out

_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's token types that are matched before the text is cut into words
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer_files(metadata: Mapping[str, Any], max_length: int) -> dict[str, str]:
    """The text of tokenizer.json and tokenizer_config.json, by file name.

    Special tokens and the chat template are kept. Raises NotSupportedError for a tokenizer that is not
    byte-level BPE or whose rule for cutting words is not known, BadInputError for contradicting metadata.
    """
    if (kind := metadata.get("tokenizer.ggml.model")) != "gpt2":
        raise NotSupportedError(
            f"tokenizer.ggml.model is {kind!r}; known: 'gpt2' (byte-level BPE). Take the Hugging Face folder"
        )
    named = str(metadata.get("tokenizer.ggml.pre"))
    pre = _SAME_RULE.get(named, named)
    if pre not in _PRE_TOKENIZERS:
        known = ", ".join(sorted({*_PRE_TOKENIZERS, *_SAME_RULE}))
        raise NotSupportedError(
            f"tokenizer.ggml.pre is {named!r}: how it cuts text into words is not known here (known: {known})"
        )
    tokens: list[str] = metadata.get("tokenizer.ggml.tokens", [])
    types: list[int] = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    merges: list[str] = metadata.get("tokenizer.ggml.merges", [])
    vocab = {token: number for number, token in enumerate(tokens)}
    if not tokens or len(vocab) != len(tokens) or len(types) != len(tokens) or not merges:
        raise BadInputError(
            f"the tokenizer holds {len(tokens)} tokens ({len(vocab)} different), {len(types)} types and "
            f"{len(merges)} merges: each token must be there once and with a type, and merges too"
        )
    roles = {role: _token(metadata, tokens, key) for role, key in _ROLES.items()}
    adds_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", pre in _ADDS_BOS_UNLESS_TOLD))
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(i, tokens[i], kind) for i, kind in enumerate(types) if kind in (_CONTROL, _USER_DEFINED)
        ],
        "normalizer": None,
        "pre_tokenizer": _PRE_TOKENIZERS[pre],
        "post_processor": _begins_with(roles["bos_token"], vocab) if adds_bos else None,
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe",  # a word that is a token is taken whole, as tiktoken does
            "vocab": vocab,
            "merges": [merge.split(" ", 1) for merge in merges],
        },
    }
    config = {
        "add_prefix_space": False,
        **{role: token for role, token in roles.items() if token is not None},
        "chat_template": metadata.get("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        # Takes tokenizer.json as it is; GPT2Tokenizer of transformers 5 has a word rule of its own.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if config["chat_template"] is None:
        del config["chat_template"]
    return {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2) + "\n",
    }


def _token(metadata: Mapping[str, Any], tokens: list[str], key: str) -> str | None:
    number: Any = metadata.get(f"tokenizer.ggml.{key}_token_id")
    if number is None:
        return None
    if not (isinstance(number, int) and 0 <= number < len(tokens)):
        raise BadInputError(f"tokenizer.ggml.{key}_token_id is {number}, but there are {len(tokens)} tokens")
    return tokens[number]


def _added(number: int, token: str, kind: int) -> dict[str, Any]:
    return {
        "id": number,
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": kind == _CONTROL,
    }


def _begins_with(bos: str | None, vocab: Mapping[str, int]) -> dict[str, Any]:
    if bos is None:
        raise BadInputError("tokenizer.ggml.add_bos_token is set, but tokenizer.ggml.bos_token_id is missing")
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    text = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return {
        "type": "TemplateProcessing",
        "single": [first, text[0]],
        "pair": [first, text[0], text[1]],
        "special_tokens": {bos: {"id": bos, "ids": [vocab[bos]], "tokens": [bos]}},
    }
