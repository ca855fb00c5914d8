"""`--pass-through`: what stands beside a language model goes to a side file and comes back, to the last bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from ckptbridge.cli import app
from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.diff import diff
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.hf_folder import read_json
from ckptbridge.converters.model import open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.recheck import recheck
from ckptbridge.converters.reshard import plan_reshard
from ckptbridge.converters.safetensors_header import read_header
from tests.conftest import TinyFolders
from tests.converters.fp8_models import held, write_folder

PREFIXES = ("vision_tower.", "multi_modal_projector.")
BESIDE: dict[str, Tensor] = {
    "vision_tower.patch.weight": torch.randn(3, 4, 5, 5),
    "vision_tower.position": torch.randn(7, 3).bfloat16(),
    "vision_tower.codes": torch.arange(12, dtype=torch.uint8).view(3, 4),
    "vision_tower.count": torch.tensor(5),
    "multi_modal_projector.linear.bias": torch.randn(9).half(),
}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two folders hold the same tensors, bit for bit."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and torch.equal(a[name], b[name])
        for name in a
    )


def plain(source: Path, folder: Path) -> Path:
    """A model with a vision tower beside it, under the names of the language model alone."""
    return write_folder(folder, read_json(source / "config.json"), {**held(source), **BESIDE}, files=2)


def wrapped(source: Path, folder: Path) -> Path:
    """The same as multimodal classes have it: names begin with language_model., its config is a part of theirs."""
    own = read_json(source / "config.json")
    config: dict[str, Any] = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": own.pop("dtype"),
        "tie_word_embeddings": own.pop("tie_word_embeddings"),
        "text_config": own,
        "vision_config": {"hidden_size": 3},
    }
    tensors = {f"language_model.{name}": tensor for name, tensor in held(source).items()}
    return write_folder(folder, config, {**tensors, **BESIDE}, files=2)


@pytest.mark.parametrize("to", ["torch_dist", "torch"])
@pytest.mark.parametrize("made", [plain, wrapped])
def test_it_goes_there_and_comes_back(made: Any, to: Any, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = made(tiny_folder("qwen3_moe"), tmp_path / "source")
    model = open_model(source, pass_through=PREFIXES)
    options = ConvertOptions(layout=ParallelLayout(tp=2, ep=2, etp=1), dtype=torch.bfloat16)
    receipt = execute(plan_conversion(model, tmp_path / "mcore", to, options))
    assert same(load_file(tmp_path / "mcore" / "hf" / "passed_through.safetensors"), BESIDE)
    assert BESIDE.keys() <= receipt.source_tensors.keys() & receipt.target_tensors.keys()
    found = open_model(tmp_path / "mcore")
    assert recheck(found, receipt).passed
    assert diff(model, found).same is False  # bf16
    execute(plan_conversion(found, tmp_path / "back", "hf", ConvertOptions(max_shard_size=100_000)))
    expected = {name: t if name in BESIDE else t.bfloat16() for name, t in held(source).items()}
    assert same(held(tmp_path / "back"), expected)
    assert read_json(tmp_path / "back" / "config.json") == read_json(source / "config.json") | {"dtype": "bfloat16"}


def test_a_reshard_takes_it_along(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    model = open_model(wrapped(tiny_folder("llama"), tmp_path / "source"), pass_through=PREFIXES)
    execute(plan_conversion(model, tmp_path / "one", "torch_dist", ConvertOptions()))
    options = ConvertOptions(layout=ParallelLayout(tp=2, pp=2))
    execute(plan_reshard(open_model(tmp_path / "one"), tmp_path / "two", "torch_dist", options))
    execute(plan_conversion(open_model(tmp_path / "two"), tmp_path / "back", "hf", ConvertOptions()))
    assert same(held(tmp_path / "back"), held(tmp_path / "source"))


def test_without_the_flag_it_is_refused_by_name(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"unexpected: .*vision_tower\.patch\.weight"):
        open_model(plain(tiny_folder("llama"), tmp_path / "source"))


def test_a_prefix_that_is_not_enough_is_refused(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    folder = wrapped(tiny_folder("llama"), tmp_path / "source")
    with pytest.raises(BadInputError, match=r"multi_modal_projector\.linear\.bias.*language_model\."):
        open_model(folder, pass_through=["vision_tower."])
    with pytest.raises(BadInputError, match="audio"):
        open_model(folder, pass_through=[*PREFIXES, "audio."])
    with pytest.raises(BadInputError, match="missing"):
        open_model(folder, pass_through=[*PREFIXES, "language_model.model.layers.1."])


def test_the_command(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = wrapped(tiny_folder("llama"), tmp_path / "source")
    flags = [part for prefix in PREFIXES for part in ("--pass-through", prefix)]
    for arguments in (
        ["hf2mcore", str(source), str(tmp_path / "mcore"), *flags, "--json", "--tp", "2"],
        ["mcore2hf", str(tmp_path / "mcore"), str(tmp_path / "back"), "--json"],
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        json.loads(result.stdout)
    assert same(held(tmp_path / "back"), held(source))


def test_of_what_is_quantised_it_is_no_part(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    model = open_model(wrapped(tiny_folder("llama"), tmp_path / "source"), pass_through=PREFIXES)
    execute(plan_conversion(model, tmp_path / "mcore", "torch_dist", ConvertOptions()))
    execute(
        plan_conversion(open_model(tmp_path / "mcore"), tmp_path / "fp8", "hf", ConvertOptions(quantize="fp8-block"))
    )
    made = held(tmp_path / "fp8")
    assert same({name: made[name] for name in BESIDE}, BESIDE)
    assert made["language_model.model.layers.0.mlp.up_proj.weight"].dtype == torch.float8_e4m3fn
    assert open_model(tmp_path / "fp8", pass_through=PREFIXES).beside.keys() == BESIDE.keys()


@pytest.mark.parametrize("made", [plain, wrapped])
def test_what_comes_back_is_checked_with_its_own_receipt(made: Any, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source, flags = made(tiny_folder("llama"), tmp_path / "source"), list[str]()
    for prefix in PREFIXES:
        flags += ["--pass-through", prefix]
    execute(plan_conversion(open_model(source, pass_through=PREFIXES), tmp_path / "mcore", "torch_dist"))
    execute(plan_conversion(open_model(tmp_path / "mcore"), tmp_path / "back", "hf"))
    there = ["verify", str(source), "--against-receipt", str(tmp_path / "mcore" / "ckptbridge_receipt.json")]
    assert CliRunner().invoke(app, [*there, *flags, "--json"]).exit_code == 0
    check = ["verify", str(tmp_path / "back"), "--against-receipt", str(tmp_path / "back" / "ckptbridge_receipt.json")]
    result = CliRunner().invoke(app, [*check, *flags, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["checked"] == len(held(source))
    spoil(tmp_path / "back" / "model.safetensors", "vision_tower.codes")
    result = CliRunner().invoke(app, [*check, *flags, "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["changed"] == ["vision_tower.codes"]
    result = CliRunner().invoke(app, ["verify", str(source), str(tmp_path / "back"), *flags])
    assert result.exit_code == 2
    assert "--against-receipt" in result.output


@pytest.mark.parametrize("name", BESIDE)
def test_diff_sees_it(name: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    model = open_model(plain(tiny_folder("llama"), tmp_path / "source"), pass_through=PREFIXES)
    execute(plan_conversion(model, tmp_path / "mcore", "torch_dist"))
    found = open_model(tmp_path / "mcore")
    assert diff(model, found).same
    assert diff(model, found).equal == len(found.tensors) + len(BESIDE)
    spoil(tmp_path / "mcore" / "hf" / "passed_through.safetensors", name)
    result = diff(model, found)
    assert [difference.name for difference in result.differences] == [name]
    assert set(diff(model, replace(found, beside={})).only_a) == BESIDE.keys()


def spoil(file: Path, name: str) -> None:
    """One bit of a tensor in a safetensors file."""
    stored = read_header(file)[name]
    with file.open("r+b") as out:
        out.seek(stored.offset)
        byte = out.read(1)[0]
        out.seek(stored.offset)
        out.write(bytes([byte ^ 1]))
