"""`mcore2hf --quantize fp8-block`: codes and scales as the naive loop chooses them, read back within fp8's rounding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ckptbridge.cli import app
from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.fp8_quantise import quantised as lazily_quantised
from ckptbridge.converters.model import open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.receipt import read_receipt
from ckptbridge.converters.recheck import recheck
from ckptbridge.converters.tensors import InMemory
from tests.conftest import TinyFolders
from tests.converters.fp8_models import PUBLISHED, Wide, held, meant, quantised, wide_pairs

BLOCK = (128, 128)
QUANTIZED = ConvertOptions(quantize="fp8-block")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Wide:
    return wide_pairs(tmp_path_factory)


def to_mcore(source: Path, target: Path, dtype: torch.dtype | None = None) -> Path:
    options = ConvertOptions(layout=ParallelLayout(tp=2), dtype=dtype)
    execute(plan_conversion(open_model(source), target, "torch_dist", options))
    return target


@pytest.mark.parametrize("max_ram", [1, 1 << 30])
@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen2_moe"])
def test_codes_scales_and_what_is_kept(name: str, max_ram: int, wide: Wide, tmp_path: Path) -> None:
    fp8, bf16 = wide(name)
    mcore = to_mcore(bf16, tmp_path / "mcore")
    options = ConvertOptions(quantize="fp8-block", max_ram=max_ram, max_shard_size=300_000)
    receipt = execute(plan_conversion(open_model(mcore), tmp_path / "out", "hf", options))
    made, plain = held(tmp_path / "out"), held(bf16)
    assert made.keys() == held(fp8).keys(), "what DeepSeek quantises, and nothing else"
    for key, tensor in plain.items():
        if f"{key}_scale_inv" not in made:
            assert torch.equal(made[key], tensor), key
            continue
        codes, scales = quantised(tensor, BLOCK)
        assert torch.equal(made[f"{key}_scale_inv"], scales), key
        assert torch.equal(made[key].view(torch.uint8), codes.view(torch.uint8)), key
        meaning = meant(codes, scales, BLOCK, torch.float32)
        wide_scales = meant(torch.ones(codes.shape, dtype=codes.dtype), scales, BLOCK, torch.float32)
        bound = torch.maximum(tensor.float().abs() / 16, wide_scales / 1024)
        assert bool(((meaning - tensor.float()).abs() <= bound * (1 + 1e-6)).all()), key
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    kept = told.pop("modules_to_not_convert")
    assert told == PUBLISHED
    assert "lm_head" in kept
    assert not any(f"{module}.weight_scale_inv" in made for module in kept)
    assert receipt == read_receipt(tmp_path / "out")
    assert receipt.target_tensors.keys() == made.keys()
    assert any("float8_e4m3fn" in note for note in receipt.notes)
    assert recheck(open_model(tmp_path / "out"), receipt).passed


def test_our_reader_takes_it_and_gives_the_meant_weights(wide: Wide, tmp_path: Path) -> None:
    _, bf16 = wide("mixtral")
    mcore = to_mcore(bf16, tmp_path / "mcore")
    execute(plan_conversion(open_model(mcore), tmp_path / "fp8", "hf", QUANTIZED))
    made = held(tmp_path / "fp8")
    back = to_mcore(tmp_path / "fp8", tmp_path / "again")
    execute(plan_conversion(open_model(back), tmp_path / "bf16", "hf", ConvertOptions()))
    for key, tensor in held(tmp_path / "bf16").items():
        scales = made.get(f"{key}_scale_inv")
        assert torch.equal(tensor, made[key] if scales is None else meant(made[key], scales, BLOCK)), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_was_fp8_comes_back_with_its_codes(dtype: torch.dtype, wide: Wide, tmp_path: Path) -> None:
    """Only scales are off, by the rounding of the largest weight in between; from then on nothing changes."""
    source, _ = wide("qwen2_moe")
    turns = [source]
    for turn in range(2):
        mcore = to_mcore(turns[-1], tmp_path / f"mcore{turn}", dtype)
        options = ConvertOptions(quantize="fp8-block")
        execute(plan_conversion(open_model(mcore), tmp_path / f"fp8{turn}", "hf", options))
        turns.append(tmp_path / f"fp8{turn}")
    first, second, third = map(held, turns)
    assert first.keys() == second.keys() == third.keys()
    off = 2**-8 if dtype == torch.bfloat16 else 2**-22
    for key, tensor in first.items():
        if key.endswith("_scale_inv"):
            assert bool(((second[key] - tensor).abs() <= off * tensor).all()), key
            assert torch.equal(third[key], second[key]), key
        elif f"{key}_scale_inv" in first:
            assert torch.equal(second[key].view(torch.uint8), tensor.view(torch.uint8)), key
            assert torch.equal(third[key].view(torch.uint8), tensor.view(torch.uint8)), key


def test_a_block_of_zeros_has_a_scale() -> None:
    from tests.converters.test_families import PUBLISHED as CONFIGS
    from tests.converters.test_families import family_of, parse

    config = CONFIGS["Llama-3.2-1B"]
    name = "model.layers.0.mlp.down_proj.weight"
    weight = torch.randn(200, 300)
    weight[:128, 128:256] = 0
    made = lazily_quantised({name: InMemory(weight)}, family_of(config, "test"), parse(config), "test")
    codes, scales = made[name].read(), made[f"{name}_scale_inv"].read()
    assert scales[0, 1] == 1
    assert torch.equal(meant(codes, scales, BLOCK, torch.float32)[:128, 128:256], torch.zeros(128, 128))
    weight[150, 7] = float("nan")
    with pytest.raises(BadInputError, match=r"down_proj.weight' holds NaN"):
        made[name].read()


def test_stacks_of_experts_are_refused(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    mcore = tmp_path / "mcore"
    execute(plan_conversion(open_model(tiny_folder("gpt_oss")), mcore, "torch_dist", ConvertOptions()))
    with pytest.raises(NotSupportedError, match="GptOssForCausalLM holds experts in stacks"):
        plan_conversion(open_model(mcore), tmp_path / "out", "hf", QUANTIZED)


def test_the_command(wide: Wide, tmp_path: Path) -> None:
    mcore = to_mcore(wide("llama")[1], tmp_path / "mcore")
    arguments = ["mcore2hf", str(mcore), str(tmp_path / "out"), "--quantize", "fp8-block", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert {t.dtype for t in held(tmp_path / "out").values()} == {torch.bfloat16, torch.float32, torch.float8_e4m3fn}


def test_of_deepseek_v3_the_same_matrices_are_quantised_as_in_its_files(
    tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    mcore = to_mcore(tiny_folder("deepseek_v3"), tmp_path / "mcore")
    execute(plan_conversion(open_model(mcore), tmp_path / "fp8", "hf", QUANTIZED))
    made = held(tmp_path / "fp8")
    kinds = {name.removesuffix(".weight_scale_inv").split(".")[-1] for name in made if name.endswith("_scale_inv")}
    attention = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    assert kinds == attention | {"gate_proj", "up_proj", "down_proj"}
    assert {t.dtype for name, t in made.items() if name.endswith(("gate.weight", "eh_proj.weight", "norm.weight"))} == {
        torch.float32
    }
