"""A GGUF file becomes the Hugging Face folder that it was made from; damaged and unknown ones are refused.

The files are made here as llama.cpp's converter makes them: rows of q and k interleaved, matrices quantised.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.gguf import gguf_to_hf
from ckptbridge.converters.gguf_header import read_header

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SAMPLE = "def f(x):\n    return x + 1234  # naïve – 漢字\n\n\nclass A:\n\tn = 10\n"
CHAT_TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
Q8_0, Q4_1, F32 = (
    gguf.GGMLQuantizationType.Q8_0,
    gguf.GGMLQuantizationType.Q4_1,
    gguf.GGMLQuantizationType.F32,
)
Kinds = Callable[[str], gguf.GGMLQuantizationType]

_HF_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def as_smollm(name: str) -> gguf.GGMLQuantizationType:
    """The types of SmolLM2's file: matrices Q4_1, embeddings Q8_0, norms F32."""
    if name.endswith("norm.weight"):
        return F32
    return Q8_0 if name == "token_embd.weight" else Q4_1


def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE with digits apart, as SmolLM2's is, trained on three lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([SAMPLE, "class B:\n    x = 100", "    return 1  # 2"], trainer)
    return tokenizer


def tiny_llama(*, tied: bool, rope: dict[str, Any] | None = None) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).float().eval()


@dataclass(frozen=True)
class GgufFile:
    path: Path
    logits: Tensor
    """What the model computes with the weights that the file holds: quantised and dequantised."""


TOKENS = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(3))


def logits(model: LlamaForCausalLM) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    *,
    kinds: Kinds = as_smollm,
    interleave: bool = True,
    architecture: str = "llama",
    pre: str = "smollm",
    drop: str = "",
    extra: dict[str, np.ndarray] | None = None,
    metadata: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> GgufFile:
    """Write a model as llama.cpp's converter does. The model's own weights become the dequantised ones."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, pre)
    metadata(writer)
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if not config.tie_word_embeddings:
        names["output.weight"] = "lm_head.weight"
    for layer in range(config.num_hidden_layers):
        for name, hf_name in _HF_NAMES.items():
            names[f"blk.{layer}.{name}.weight"] = f"model.layers.{layer}.{hf_name}.weight"
    weights = dict(model.named_parameters())
    for name, hf_name in names.items():
        kind, weight = kinds(name), weights[hf_name]
        stored = gguf.quants.quantize(weight.detach().numpy(), kind)
        with torch.no_grad():
            weight.copy_(torch.from_numpy(np.array(gguf.quants.dequantize(stored, kind))))
        if interleave and ".attn_q." in name:
            stored = _interleaved(stored, config.num_attention_heads)
        if interleave and ".attn_k." in name:
            stored = _interleaved(stored, config.num_key_value_heads)
        if name != drop:
            writer.add_tensor(name, stored, raw_dtype=kind)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(path, logits(model))


def _interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's own permutation (convert_hf_to_gguf.py, `LlamaModel.permute`), on quantised rows."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def _add_tokenizer(writer: gguf.GGUFWriter, pre: str) -> None:
    model = json.loads(tiny_tokenizer().to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    types = [gguf.TokenType.CONTROL if token in SPECIAL else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)


def loaded(folder: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kinds", [as_smollm, lambda name: F32, lambda name: F32 if "norm" in name else Q8_0])
def test_logits_are_those_of_the_model_it_came_from(tmp_path: Path, tied: bool, kinds: Kinds) -> None:
    made = write_gguf(tmp_path / "m.gguf", tiny_llama(tied=tied), kinds=kinds)
    model = loaded(gguf_to_hf(made.path, tmp_path / "hf", dtype=torch.float32))
    assert torch.equal(logits(model), made.logits)
    assert model.config.tie_word_embeddings is tied


def test_an_oracle_that_sees_the_row_order(tmp_path: Path) -> None:
    """Planted fault: rows of q and k left as Hugging Face has them. The logits must not survive that."""
    made = write_gguf(tmp_path / "m.gguf", tiny_llama(tied=True), interleave=False)
    model = loaded(gguf_to_hf(made.path, tmp_path / "hf", dtype=torch.float32))
    assert (logits(model) - made.logits).abs().max() > 0.1


def test_bf16_is_the_default_and_is_the_rounded_value(tmp_path: Path) -> None:
    made = write_gguf(tmp_path / "m.gguf", tiny_llama(tied=True))
    exact = loaded(gguf_to_hf(made.path, tmp_path / "fp32", dtype=torch.float32)).state_dict()
    rounded = loaded(gguf_to_hf(made.path, tmp_path / "bf16")).state_dict()
    assert json.loads((tmp_path / "bf16/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert all(torch.equal(rounded[name], exact[name].bfloat16().float()) for name in exact)
    assert not all(torch.equal(rounded[name], exact[name]) for name in exact)


def test_the_config_is_the_models(tmp_path: Path) -> None:
    model = tiny_llama(tied=True)
    made = write_gguf(tmp_path / "m.gguf", model)
    config = loaded(gguf_to_hf(made.path, tmp_path / "hf", dtype=torch.float32)).config
    mine, theirs = config.to_dict(), model.config.to_dict()
    differ = {key for key in theirs if mine.get(key) != theirs[key]}
    # initializer_range is not in the metadata; the token ids and the class name are set by saving.
    assert differ <= {"initializer_range", "pad_token_id", "architectures", "_name_or_path", "dtype"}
    assert (config.pad_token_id, config.architectures) == (2, ["LlamaForCausalLM"])


def test_llama3_rope_scaling_is_found_again(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = tiny_llama(tied=True, rope=rope)
    plain = 500000.0 ** -(torch.arange(0, 32, 2) / 32)
    divisors = (plain / model.model.rotary_emb.inv_freq).numpy()
    made = write_gguf(tmp_path / "m.gguf", model, extra={"rope_freqs.weight": divisors})
    read = loaded(gguf_to_hf(made.path, tmp_path / "hf", dtype=torch.float32))
    assert read.config.rope_parameters == rope
    assert torch.equal(logits(read), made.logits)
    bent = write_gguf(tmp_path / "bent.gguf", model, extra={"rope_freqs.weight": divisors * 1.01})
    with pytest.raises(NotSupportedError, match="rope_freqs"):
        gguf_to_hf(bent.path, tmp_path / "bent")


def test_the_tokenizer_is_the_models(tmp_path: Path) -> None:
    made = write_gguf(tmp_path / "m.gguf", tiny_llama(tied=True))
    theirs, mine = tiny_tokenizer(), AutoTokenizer.from_pretrained(gguf_to_hf(made.path, tmp_path / "hf"))
    source = Path(__file__).read_text()
    for text in (SAMPLE, source, "2024 10:30  1 2\t3"):
        assert mine(text)["input_ids"] == theirs.encode(text).ids
        assert mine.decode(mine(text)["input_ids"]) == text
    assert mine("<|im_start|>")["input_ids"] == [1]
    assert (mine.bos_token, mine.eos_token, mine.pad_token, mine.unk_token) == (
        *SPECIAL[1:],
        SPECIAL[2],
        SPECIAL[0],
    )
    assert mine.model_max_length == 128
    chat = [{"role": "user", "content": "hello"}]
    assert mine.apply_chat_template(chat, tokenize=False) == "<|im_start|>hello<|im_end|>"


def test_the_rule_for_words_matters(tmp_path: Path) -> None:
    """Planted fault: a file that says gpt-2 where smollm is meant gives other tokens before digits."""
    made = write_gguf(tmp_path / "m.gguf", tiny_llama(tied=True), pre="gpt-2")
    mine = AutoTokenizer.from_pretrained(gguf_to_hf(made.path, tmp_path / "hf"))
    assert mine("x =     1")["input_ids"] != tiny_tokenizer().encode("x =     1").ids


def test_a_tokenizer_that_begins_with_bos(tmp_path: Path) -> None:
    made = write_gguf(tmp_path / "m.gguf", tiny_llama(tied=True), metadata=lambda w: w.add_add_bos_token(True))
    mine = AutoTokenizer.from_pretrained(gguf_to_hf(made.path, tmp_path / "hf"))
    assert mine("class")["input_ids"] == [1, *tiny_tokenizer().encode("class").ids]


def test_llama3s_rule_cuts_digits_in_threes(tmp_path: Path) -> None:
    made = write_gguf(tmp_path / "m.gguf", tiny_llama(tied=True), pre="llama-bpe")
    mine = AutoTokenizer.from_pretrained(gguf_to_hf(made.path, tmp_path / "hf"))
    words = mine.backend_tokenizer.pre_tokenizer.pre_tokenize_str("it's 12345")
    assert [word for word, _ in words] == ["it", "'s", "Ġ", "123", "45"]


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ({"architecture": "gemma3"}, NotSupportedError, "'gemma3'.*known: llama"),
        ({"metadata": lambda w: w.add_expert_count(8)}, NotSupportedError, "mixture of experts"),
        (
            {"metadata": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN)},
            NotSupportedError,
            "rope.scaling.type 'yarn'",
        ),
        ({"pre": "jais"}, NotSupportedError, "'jais'.*known: .*smollm"),
        ({"drop": "blk.1.ffn_up.weight"}, BadInputError, "missing: blk.1.ffn_up.weight;"),
        (
            {"extra": {"blk.2.attn_norm.weight": np.ones(64, np.float32)}},
            BadInputError,
            "does not have: blk.2.attn_norm.weight",
        ),
    ],
    ids=["architecture", "experts", "rope", "pre-tokenizer", "missing", "unknown"],
)
def test_what_it_does_not_know_is_refused_by_name(
    tmp_path: Path, fault: dict[str, Any], error: type[Exception], message: str
) -> None:
    made = write_gguf(tmp_path / "m.gguf", tiny_llama(tied=True), **fault)
    with pytest.raises(error, match=message) as refused:
        gguf_to_hf(made.path, tmp_path / "hf")
    assert str(made.path) in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_metadata_that_contradicts_the_tensors(tmp_path: Path) -> None:
    model = tiny_llama(tied=True)
    model.config.intermediate_size = 64
    made = write_gguf(tmp_path / "m.gguf", model)
    with pytest.raises(BadInputError, match=r"blk\.0\.ffn_gate\.weight is \[96, 64\].*\[64, 64\]"):
        gguf_to_hf(made.path, tmp_path / "hf")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    """Cut anywhere, within the header or the weights: one clear error, nothing written."""
    whole = write_gguf(tmp_path / "m.gguf", tiny_llama(tied=True)).path.read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [0, 3, 4, 7, 20, 100, *range(150, len(whole) - 1, 977), len(whole) - 64]:
        cut.write_bytes(whole[:size])
        with pytest.raises(BadInputError):
            gguf_to_hf(cut, tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.gguf", "m.gguf"]


def test_a_count_no_file_can_hold_is_refused_at_once(tmp_path: Path) -> None:
    """2^60 one-byte items, announced in the metadata, must not be looped over or allocated."""
    array = (4).to_bytes(8, "little") + b"some" + (9).to_bytes(4, "little")
    array += (0).to_bytes(4, "little") + (1 << 60).to_bytes(8, "little")
    head = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    (tmp_path / "m.gguf").write_bytes(head + array + bytes(100))
    with pytest.raises(BadInputError, match=f"{1 << 60} items are announced"):
        read_header(tmp_path / "m.gguf")


def test_files_that_are_no_gguf(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no such file"):
        gguf_to_hf(tmp_path / "absent.gguf", tmp_path / "hf")
    with pytest.raises(BadInputError, match="no such file"):
        gguf_to_hf(tmp_path, tmp_path / "hf")
    (tmp_path / "text.gguf").write_text("hello, this is text")
    with pytest.raises(BadInputError, match="not a GGUF file"):
        gguf_to_hf(tmp_path / "text.gguf", tmp_path / "hf")


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    made = write_gguf(tmp_path / "m.gguf", tiny_llama(tied=True))
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/mine").write_text("mine")
    with pytest.raises(BadInputError, match="exists already"):
        gguf_to_hf(made.path, tmp_path / "hf")
    assert (tmp_path / "hf/mine").read_text() == "mine"


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = write_gguf(tmp_path / "m.gguf", tiny_llama(tied=True))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(NotSupportedError, match=r"pip install 'ckptbridge\[demo\]'"):
        gguf_to_hf(made.path, tmp_path / "hf")


def test_the_header_is_what_the_gguf_package_reads(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(tied=False)).path
    mine, theirs = read_header(path), gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert mine.metadata == fields
    assert [(t.name, t.shape, t.kind, t.offset) for t in mine.tensors.values()] == [
        (t.name, tuple(t.shape.tolist()[::-1]), t.tensor_type, t.data_offset) for t in theirs.tensors
    ]
