"""Verification: transformers against the decoder on converted checkpoints, and faults that it has to see and place."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from ckptbridge.converters.convert import plan_conversion
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import open_model
from ckptbridge.trainer.comparison import Comparison, Recording
from ckptbridge.trainer.verify import VerifyReport, verify
from tests.conftest import TinyFolders
from tests.tiny import TINY, save_tiny
from tests.trainer.text import save_tokenizer

TOKENS = 96
Plant = Callable[[dict[str, Tensor]], None]


def converted(source: Path, target: Path) -> Path:
    execute(plan_conversion(open_model(source), target, "torch_dist"))
    return target


@pytest.mark.parametrize("name", TINY)
def test_a_converted_checkpoint_passes(name: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    report = verify(tiny_folder(name), converted(tiny_folder(name), tmp_path / "mcore"), tokens=TOKENS)
    assert report.passed
    assert (report.format_a, report.format_b) == ("hf", "torch_dist")
    assert report.loss_difference <= 1e-6
    assert report.max_relative_logit_difference <= 1e-5
    assert report.kl <= 1e-9
    assert report.argmax_agreement == 1.0
    assert report.first_divergence is None
    assert report.text == "token ids drawn with seed 0"
    assert list(report.stage_differences) == [
        *("embedding", *(f"decoder.layers.{i}" for i in range(4))),
        *("decoder.final_layernorm", "output_layer"),
    ]


def test_experts_of_any_width_are_compared(tmp_path: Path) -> None:
    """Rows of 150 bf16 or fp32 numbers are no multiple of 16 bytes, which torch's grouped product asks for."""
    config = MixtralConfig(
        vocab_size=97,
        hidden_size=72,
        intermediate_size=150,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        num_local_experts=4,
        max_position_embeddings=128,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "hf")
    report = verify(tmp_path / "hf", converted(tmp_path / "hf", tmp_path / "mcore"), tokens=TOKENS)
    assert report.passed
    assert report.loss_difference <= 1e-6


def test_bf16_passes_within_its_own_tolerance(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    mcore = converted(tiny_folder("llama"), tmp_path / "mcore")
    report = verify(tiny_folder("llama"), mcore, tokens=TOKENS, dtype=torch.bfloat16)
    assert report.passed
    assert report.dtype == "bfloat16"
    assert 1e-5 < max(report.loss_difference, report.kl) < 5e-3


def _swap(one: str, other: str) -> Plant:
    def plant(weights: dict[str, Tensor]) -> None:
        weights[one], weights[other] = weights[other], weights[one]

    return plant


def _transpose(name: str) -> Plant:
    def plant(weights: dict[str, Tensor]) -> None:
        weights[name] = weights[name].t().contiguous()

    return plant


def _scale(name: str, factor: float) -> Plant:
    def plant(weights: dict[str, Tensor]) -> None:
        weights[name] = weights[name] * factor

    return plant


L2 = "model.layers.2."


@pytest.mark.parametrize(
    ("name", "plant", "where"),
    [
        ("llama_tied", _swap(f"{L2}mlp.gate_proj.weight", f"{L2}mlp.up_proj.weight"), "decoder.layers.2"),
        ("llama_tied", _transpose(f"{L2}self_attn.o_proj.weight"), "decoder.layers.2"),
        ("llama_tied", _scale("model.norm.weight", 1.01), "decoder.final_layernorm"),
        ("llama_tied", _scale("model.embed_tokens.weight", 1.001), "embedding"),
        ("qwen3", _swap(f"{L2}self_attn.q_norm.weight", f"{L2}self_attn.k_norm.weight"), "decoder.layers.2"),
        (
            "qwen3_moe_dense_first",
            _swap(f"{L2}mlp.experts.3.down_proj.weight", f"{L2}mlp.experts.5.down_proj.weight"),
            "decoder.layers.2",
        ),
    ],
)
def test_a_planted_fault_fails_and_is_placed(name: str, plant: Plant, where: str, tmp_path: Path) -> None:
    source = save_tiny(name, tmp_path / "hf")
    faulty = save_tiny(name, tmp_path / "faulty")
    files = {path: load_file(path) for path in faulty.glob("*.safetensors")}
    everything = {key: tensor for tensors in files.values() for key, tensor in tensors.items()}
    plant(everything)
    for path, tensors in files.items():
        save_file({key: everything[key] for key in tensors}, path, metadata={"format": "pt"})
    report = verify(source, converted(faulty, tmp_path / "mcore"), tokens=TOKENS)
    assert not report.passed
    assert report.first_divergence == where
    assert report.kl > 1e-5 or report.loss_difference > 1e-5


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llama", "rope_parameters", {"rope_type": "default", "rope_theta": 30000.0}),
        ("qwen3_moe", "norm_topk_prob", False),
        ("mistral", "sliding_window", None),
    ],
)
def test_a_wrong_config_fails_at_the_first_layer(name: str, key: str, value: object, tmp_path: Path) -> None:
    source, faulty = save_tiny(name, tmp_path / "hf"), save_tiny(name, tmp_path / "faulty")
    config = json.loads((faulty / "config.json").read_text())
    (faulty / "config.json").write_text(json.dumps({**config, key: value}))
    report = verify(source, converted(faulty, tmp_path / "mcore"), tokens=TOKENS)
    assert not report.passed
    assert report.first_divergence == "decoder.layers.0"


def test_a_larger_tolerance_lets_a_small_fault_pass(tmp_path: Path) -> None:
    source, other = save_tiny("llama", tmp_path / "hf"), save_tiny("llama", tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    _scale("model.norm.weight", 1.001)(weights)
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert not verify(source, other, tokens=TOKENS).passed
    assert verify(source, other, tokens=TOKENS, tolerance=0.01).passed


def test_text_is_tokenised_without_bos_and_cut(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "hf")
    save_tokenizer(source)
    mcore = converted(source, tmp_path / "mcore")
    report = verify(source, mcore, text="some text of many letters", tokens=9)
    assert (report.tokens, report.text) == (9, "the text given")
    default = verify(mcore, source, tokens=50)
    assert (default.tokens, default.text) == (50, "the Apache-2.0 licence")
    assert (default.format_a, default.passed) == ("torch_dist", True)
    with pytest.raises(BadInputError, match="at least 2"):
        verify(source, mcore, text="a")


def test_a_text_without_a_tokenizer_is_refused(tiny_folder: TinyFolders) -> None:
    with pytest.raises(BadInputError, match="has a tokenizer"):
        verify(tiny_folder("llama"), tiny_folder("llama"), text="some text")


def test_other_vocabularies_are_refused(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=99, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    with pytest.raises(BadInputError, match=r"250 words and .* 99"):
        verify(tiny_folder("llama"), tmp_path / "other")


def test_the_numbers_equal_their_definitions(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (3 * torch.randn(300, 11, generator=generator) for _ in range(2))
    ids = torch.randint(11, (300,), generator=generator)
    recorded = Recording(tmp_path)
    for start in range(0, 300, 128):
        recorded.logits(start, a[start : start + 128])
    compared = Comparison(recorded, ids)
    for start in range(0, 300, 128):
        compared.logits(start, b[start : start + 128])
    report = compared.differences()
    cross_entropy, kl = torch.nn.functional.cross_entropy, torch.nn.functional.kl_div
    assert report.loss_a == pytest.approx(cross_entropy(a[:-1], ids[1:]).item(), rel=1e-6)
    assert report.loss_b == pytest.approx(cross_entropy(b[:-1], ids[1:]).item(), rel=1e-6)
    log_a, log_b = a.log_softmax(1), b.log_softmax(1)
    assert report.kl == pytest.approx(kl(log_b, log_a, log_target=True, reduction="batchmean").item(), rel=1e-5)
    assert report.argmax_agreement == pytest.approx((a.argmax(1) == b.argmax(1)).float().mean().item())
    assert report.max_abs_logit_difference == (a - b).abs().max().item()
    assert report.max_relative_logit_difference == pytest.approx(((a - b).abs().max() / a.abs().max()).item())
    assert list(report.stages) == ["output_layer"]


def test_nan_never_passes_and_is_null_in_json(tiny_folder: TinyFolders) -> None:
    report: VerifyReport = verify(tiny_folder("llama"), tiny_folder("llama"), tokens=9)
    assert report.to_json()["passed"] is True
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["loss_a"] == report.loss_a
    broken = replace(report, loss_difference=math.nan, stage_differences={"embedding": math.nan})
    assert not broken.passed
    assert json.loads(json.dumps(broken.to_json(), allow_nan=False))["stage_differences"] == {"embedding": None}
