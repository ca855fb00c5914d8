"""What is read whole or told in a message stays small, whatever a file holds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ckptbridge.converters.errors import BadInputError, NotSupportedError, StorageError, told
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.receipt import read_receipt
from ckptbridge.converters.small_files import is_file_name, read_small
from tests.converters.fuzz_sources import tiny_config


def test_a_small_file_is_read_and_nothing_else_is(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    (tmp_path / "link").symlink_to(file)
    assert read_small(file) == read_small(tmp_path / "link") == b"abc"
    assert read_small(file, 3) == b"abc"
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    for name, word in {"pipe": "plain", "zeros": "plain", "circle": "plain", "": "plain", "none": "missing"}.items():
        with pytest.raises(BadInputError, match=word) as refused:
            read_small(tmp_path / name)
        assert str(tmp_path / name) in str(refused.value)
    with pytest.raises(BadInputError, match="has 3 bytes, expected at most 2"):
        read_small(file, 2)


def test_a_large_file_is_not_read_to_find_out(tmp_path: Path) -> None:
    file = tmp_path / "sparse"
    with file.open("wb") as out:
        out.truncate(1 << 40)
    with pytest.raises(BadInputError, match=str(1 << 40)):
        read_small(file)


@pytest.mark.parametrize("name", ["model.safetensors", "__0_0.distcp", "é", "a b", "...", "x" * 255])
def test_names_of_files(name: str) -> None:
    assert is_file_name(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "/a", "a/", "a\\b", "a\0", "x" * 256, "é" * 128, None, 7, ["a"]]
)
def test_what_is_no_name_of_a_file(name: object) -> None:
    assert not is_file_name(name)


def test_a_value_is_told_in_a_few_words() -> None:
    deep: list[object] = []
    for _ in range(60):
        deep = [deep, deep]  # written out, it has 2**60 brackets
    for value in (deep, "x" * 10**6, list(range(10**5)), dict.fromkeys(range(1000), deep), 10**5000, b"x" * 10**6):
        assert len(told(value)) < 500
    assert told(["a", 1]) == "['a', 1]"


def test_a_message_is_cut_in_the_middle() -> None:
    for kind in (BadInputError, NotSupportedError, StorageError):
        message = str(kind("begin" + "x" * 10**6 + "end"))
        assert message.startswith("begin")
        assert message.endswith("end")
        assert "characters" in message
        assert len(message) < 7000
        assert str(kind("as it is")) == "as it is"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_layers", 10_001),
        ("hidden_size", 2**48),
        ("layernorm_epsilon", float("nan")),
        ("rotary_base", float("inf")),
        ("max_position_embeddings", 0),
        ("max_position_embeddings", -1),
        ("num_moe_experts", 10**6),
        ("moe_ffn_hidden_size", -1),
        ("vocab_size", 10**4000),
        ("ffn_hidden_size", "x" * 10**6),
    ],
)
def test_numbers_that_no_model_has(name: str, value: object) -> None:
    sound = tiny_config("mixtral")
    fields = {field: getattr(sound, field) for field in ModelConfig.__dataclass_fields__}
    ModelConfig(**fields)
    with pytest.raises(BadInputError) as refused:
        ModelConfig(**fields | {name: value})
    assert name in str(refused.value)


def test_the_largest_models_there_are_fit() -> None:
    """DeepSeek-V3 and a trillion parameters."""
    common = {"hidden_size": 7168, "ffn_hidden_size": 18432, "num_attention_heads": 128, "num_query_groups": 128}
    common |= {"kv_channels": 128, "vocab_size": 163_840, "max_position_embeddings": 10_485_760}
    for experts in (256, 384, 2048):
        ModelConfig(num_layers=61, num_moe_experts=experts, moe_ffn_hidden_size=2048, moe_router_topk=8, **common)


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, '{"notes": []}', '{"notes": 3}', "\ud800"])
def test_what_is_no_receipt(text: str, tmp_path: Path) -> None:
    (tmp_path / "receipt.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(BadInputError, match=r"receipt\.json"):
        read_receipt(tmp_path / "receipt.json")
