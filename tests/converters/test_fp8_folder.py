"""Hugging Face folders in fp8 with a scale for each block: read, converted, compared, refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from torch import Tensor
from typer.testing import CliRunner

from ckptbridge.cli import app
from ckptbridge.converters.announced import open_announced
from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.diff import DiffReport, diff
from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import model_of_folder, open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.receipt import read_receipt
from ckptbridge.converters.recheck import recheck
from tests.conftest import TinyFolders
from tests.converters.fp8_models import (
    PUBLISHED,
    WIDE,
    Wide,
    fp8_pair,
    held,
    meant,
    quantised,
    wide_pairs,
    write_folder,
)
from tests.converters.running import SMALL
from tests.tiny import build_tiny

FAMILIES = ("llama", "qwen2_moe", "mixtral", "deepseek_v3")
LAYOUTS = {
    "llama": ParallelLayout(tp=2, pp=2),
    "qwen2_moe": ParallelLayout(tp=2, pp=1, ep=2, etp=1),
    "mixtral": ParallelLayout(tp=2, ep=2, etp=2),
    "deepseek_v3": ParallelLayout(tp=2, pp=2, ep=2),
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Wide:
    return wide_pairs(tmp_path_factory)


def compared(a: Path, b: Path) -> DiffReport:
    return diff(open_model(a), open_model(b))


@pytest.mark.parametrize("block", [(128, 128), (32, 48), (7, 5)])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_fp8_folder_is_the_bf16_model_that_it_means(
    name: str, block: tuple[int, int], tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    fp8, bf16 = fp8_pair(tiny_folder(name), tmp_path, block, files=2)
    report = compared(fp8, bf16)
    assert report.same, report
    assert report.equal == len(open_model(bf16).tensors)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back_gives_the_bf16_files(name: str, workers: int, wide: Wide, tmp_path: Path) -> None:
    fp8, bf16 = wide(name)
    options = ConvertOptions(**SMALL | {"layout": LAYOUTS[name], "workers": workers, "max_ram": 1 << 20})  # type: ignore[arg-type]
    execute(plan_conversion(open_model(fp8), tmp_path / "mcore", "torch_dist", options))
    execute(plan_conversion(open_model(tmp_path / "mcore"), tmp_path / "back", "hf", options))
    back, expected = held(tmp_path / "back"), held(bf16)
    assert back.keys() == expected.keys()
    assert {t.dtype for t in back.values()} == {torch.bfloat16}
    assert all(torch.equal(back[key].view(torch.int16), expected[key].view(torch.int16)) for key in expected)
    for config in (tmp_path / "mcore" / "hf" / "config.json", tmp_path / "back" / "config.json"):
        told = json.loads(config.read_text())
        assert "quantization_config" not in told
        assert told["dtype"] == "bfloat16"
    from transformers import AutoConfig

    known = AutoConfig.from_pretrained(tmp_path / "back")
    assert known.dtype == torch.bfloat16
    assert not hasattr(known, "quantization_config")


def test_the_same_files_come_of_fp8_and_of_what_it_means(wide: Wide, tmp_path: Path) -> None:
    """Byte for byte, whatever the size of the blocks that are worked on."""
    digests: list[dict[str, str]] = []
    for i, (folder, ram) in enumerate(
        [(wide("mixtral")[1], 1 << 30), (wide("mixtral")[0], 1 << 30), (wide("mixtral")[0], 1)]
    ):
        options = ConvertOptions(layout=ParallelLayout(tp=2), workers=2, max_ram=ram)
        digests.append(
            execute(plan_conversion(open_model(folder), tmp_path / str(i), "torch_dist", options)).target_tensors
        )
    assert digests[0] == digests[1] == digests[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_dtype_is_rounded_once(dtype: torch.dtype, wide: Wide, tmp_path: Path) -> None:
    fp8, _ = wide("llama")
    plan = plan_conversion(open_model(fp8), tmp_path / "hf", "hf", ConvertOptions(dtype=dtype))
    execute(plan)
    stored, found = held(fp8), held(tmp_path / "hf")
    for name, tensor in found.items():
        scales = stored.get(f"{name}_scale_inv")
        expected = stored[name].to(dtype) if scales is None else meant(stored[name], scales, (128, 128), dtype)
        assert torch.equal(tensor, expected), name
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_the_config_names_the_dtype(wide: Wide, tmp_path: Path) -> None:
    fp8, _ = wide("llama")
    config = json.loads((fp8 / "config.json").read_text())
    for told, dtype in ((None, torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)):
        folder = write_folder(tmp_path / str(told), config | {"dtype": told}, held(fp8))
        tensor = open_model(folder).tensors["decoder.layers.0.mlp.linear_fc1.weight"]
        assert tensor.dtype == dtype
    with pytest.raises(NotSupportedError, match="dtype is 'float64'"):
        open_model(write_folder(tmp_path / "float64", config | {"dtype": "float64"}, held(fp8)))


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_stacked_experts_have_stacked_scales(name: str, tmp_path: Path) -> None:
    """The state dict as transformers holds it, its experts in fp8."""
    model = build_tiny(name)
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        stored[key] = plain[key] = tensor.bfloat16()
        if ".experts." in key:
            stored[key], stored[f"{key}_scale_inv"] = quantised(tensor, (32, 24))
            plain[key] = meant(stored[key], stored[f"{key}_scale_inv"], (32, 24))
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    described = config | {"quantization_config": PUBLISHED | {"weight_block_size": [32, 24]}}
    fp8 = write_folder(tmp_path / "fp8", described, stored)
    report = compared(fp8, write_folder(tmp_path / "bf16", config, plain))
    assert report.same, report
    assert open_model(fp8).notes[0].startswith("8 weights are float8_e4m3fn")


def test_the_receipt_and_the_recheck_know_codes_and_scales(wide: Wide, tmp_path: Path) -> None:
    fp8 = write_folder(
        tmp_path / "fp8", json.loads((wide("llama")[0] / "config.json").read_text()), held(wide("llama")[0])
    )
    receipt = execute(plan_conversion(open_model(fp8), tmp_path / "mcore", "torch_dist"))
    stored = held(fp8)
    expected = {n: xxhash.xxh3_64_hexdigest(t.view(torch.uint8).numpy().tobytes()) for n, t in stored.items()}
    assert receipt.source_tensors == expected
    assert receipt.source_nbytes == sum(t.nbytes for t in stored.values())
    assert any("float8_e4m3fn" in note for note in receipt.notes)
    assert recheck(open_model(fp8), read_receipt(tmp_path / "mcore")).passed
    scale = "model.layers.1.mlp.up_proj.weight_scale_inv"
    stored[scale][0, 0] *= 2
    write_folder(fp8, json.loads((fp8 / "config.json").read_text()), stored)
    assert recheck(open_model(fp8), read_receipt(tmp_path / "mcore")).changed == (scale,)


def test_plan_and_inspect_tell_what_is_stored_and_what_is_read(wide: Wide, tmp_path: Path) -> None:
    fp8, bf16 = wide("qwen2_moe")
    shown = CliRunner().invoke(app, ["inspect", str(fp8), "--json"])
    assert shown.exit_code == 0, shown.output
    told = json.loads(shown.stdout)
    nbytes = sum(t.nbytes for t in held(bf16).values())
    assert told["nbytes_by_dtype"] == {"bfloat16": nbytes}
    stored = told["stored_nbytes_by_dtype"]
    assert sorted(stored) == ["bfloat16", "float32", "float8_e4m3fn"]
    assert sum(stored.values()) == sum(t.nbytes for t in held(fp8).values())
    assert "; in the files bfloat16: " in CliRunner().invoke(app, ["inspect", str(fp8)]).stdout
    assert "; in the files" not in CliRunner().invoke(app, ["inspect", str(bf16)]).stdout
    assert "float8_e4m3fn with a scale for each 128 x 128 block" in told["notes"][0]
    planned = CliRunner().invoke(app, ["plan", "hf2mcore", str(fp8), str(tmp_path / "mcore"), "--json"])
    assert planned.exit_code == 0, planned.output
    plan = json.loads(planned.stdout)
    assert plan["tensors_in"] == len(held(fp8))
    assert plan["nbytes"] >= nbytes
    assert "read as bfloat16" in " ".join(plan["notes"])


# --- What is refused ---

_WEIGHT = "model.layers.1.mlp.down_proj.weight"
_SCALES = f"{_WEIGHT}_scale_inv"
Change = Callable[[dict[str, Any], dict[str, Tensor]], object]


def _config(**fields: Any) -> Change:
    return lambda config, tensors: config["quantization_config"].update(fields)


def _tensor(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda config, tensors: tensors.update({name: change(tensors[name])})


REFUSED: dict[str, tuple[Change, type[Exception], tuple[str, ...]]] = {
    "a weight without its scales": (
        lambda config, tensors: tensors.pop(_SCALES),
        BadInputError,
        ("model.safetensors", repr(_WEIGHT), "without its scales", repr(_SCALES)),
    ),
    "scales without their weight": (
        lambda config, tensors: tensors.pop(_WEIGHT),
        BadInputError,
        ("model.safetensors", repr(_SCALES), "no weight", repr(_WEIGHT)),
    ),
    "scales beside a bf16 weight": (
        _tensor(_WEIGHT, Tensor.bfloat16),
        BadInputError,
        ("model.safetensors", repr(_WEIGHT), "expected float8_e4m3fn", "found bfloat16", repr(_SCALES)),
    ),
    "transposed scales": (
        _tensor(_SCALES, lambda t: t.T),
        BadInputError,
        ("model.safetensors", repr(_SCALES), "expected shape [2, 3]", "[192, 320]", "found [3, 2]"),
    ),
    "one scale for the whole weight": (
        _tensor(_SCALES, lambda t: t[0, 0]),
        BadInputError,
        (repr(_SCALES), "expected shape [2, 3]", "found []"),
    ),
    "scales of whole numbers": (
        _tensor(_SCALES, lambda t: t.int()),
        NotSupportedError,
        (repr(_SCALES), "float32", "found int32"),
    ),
    "e5m2": (
        _tensor(_WEIGHT, lambda t: t.float().to(torch.float8_e5m2)),
        NotSupportedError,
        (repr(_WEIGHT), "expected float8_e4m3fn", "found float8_e5m2"),
    ),
    "no quantization_config": (
        lambda config, tensors: config.pop("quantization_config"),
        NotSupportedError,
        ("model.safetensors", "float8_e4m3fn", "quantization_config", "bf16 files"),
    ),
    "dequantised weights, the config forgotten": (
        lambda config, tensors: (
            tensors.update({n: t.bfloat16() for n, t in tensors.items() if t.dtype == torch.float8_e4m3fn})
            or [tensors.pop(n) for n in list(tensors) if n.endswith("_scale_inv")]
        ),
        BadInputError,
        ("config.json", "no tensor", "remove quantization_config"),
    ),
    "another e4m3": (_config(fmt="e5m2"), NotSupportedError, ("config.json", "fmt is 'e5m2'", "'e4m3'")),
    "one scale a tensor": (
        _config(weight_block_size=None),
        NotSupportedError,
        ("config.json", "weight_block_size is None", "[128, 128]"),
    ),
    "blocks of nothing": (_config(weight_block_size=[0, 128]), NotSupportedError, ("weight_block_size is [0, 128]",)),
    "stored activation scales": (
        _config(activation_scheme="static"),
        NotSupportedError,
        ("activation_scheme is 'static'",),
    ),
    "an unknown field": (_config(rotation="hadamard"), NotSupportedError, ("config.json", "rotation = 'hadamard'")),
    "no object": (
        lambda config, tensors: config.update(quantization_config=["fp8"]),
        BadInputError,
        ("config.json", "quantization_config", "expected an object"),
    ),
    **{
        method: (
            lambda config, tensors, method=method: config.update(
                quantization_config={"quant_method": method, "bits": 4}
            ),
            NotSupportedError,
            ("config.json", f"quant_method is '{method}'", "expected 'fp8'", "bf16 files"),
        )
        for method in ("gptq", "awq", "nvfp4", "bitsandbytes", "compressed-tensors")
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(case: str, wide: Wide, tmp_path: Path) -> None:
    change, error, words = REFUSED[case]
    config, tensors = json.loads((wide("llama")[0] / "config.json").read_text()), held(wide("llama")[0])
    change(config, tensors)
    folder = write_folder(tmp_path / "bad", config, tensors)
    with pytest.raises(error) as refused:
        open_model(folder)
    assert not [word for word in words if word not in str(refused.value)], str(refused.value)
    shown = CliRunner().invoke(app, ["inspect", str(folder)])
    assert shown.exit_code == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers_end_the_conversion(bad: float, wide: Wide, tmp_path: Path) -> None:
    config, tensors = json.loads((wide("llama")[0] / "config.json").read_text()), held(wide("llama")[0])
    tensors[_SCALES][1, 2] = bad
    plan = plan_conversion(
        open_model(write_folder(tmp_path / "bad", config, tensors)), tmp_path / "mcore", "torch_dist"
    )
    with pytest.raises(BadInputError, match=rf"model\.safetensors: tensor '{_SCALES}': the scale at \[1, 2\] is {bad}"):
        execute(plan)
    assert not (tmp_path / "mcore").exists()


def test_codes_that_are_no_numbers_are_reported_and_refused_on_demand(wide: Wide, tmp_path: Path) -> None:
    config, tensors = json.loads((wide("llama")[0] / "config.json").read_text()), held(wide("llama")[0])
    tensors[_WEIGHT].view(torch.uint8)[3, 5:7] = torch.tensor([0x7F, 0xFF], dtype=torch.uint8)
    model = open_model(write_folder(tmp_path / "bad", config, tensors))
    receipt = execute(plan_conversion(model, tmp_path / "hf", "hf"))
    assert receipt.not_finite == {_WEIGHT: {"nan": 2, "infinite": 0}}
    found = held(tmp_path / "hf")[_WEIGHT]
    assert found.isnan().nonzero().tolist() == [[3, 5], [3, 6]]
    with pytest.raises(BadInputError, match=rf"{_WEIGHT}.*2 NaN"):
        execute(plan_conversion(model, tmp_path / "refused", "hf", ConvertOptions(check_finite=True)))


def test_a_plan_needs_the_config_and_the_index_only(wide: Wide, tmp_path: Path) -> None:
    fp8, _ = wide("mixtral")
    announced = tmp_path / "announced"
    announced.mkdir()
    for name in ("config.json", "model.safetensors.index.json"):
        shutil.copy(fp8 / name, announced)
    made = [
        plan_conversion(model, tmp_path / "mcore", "torch_dist", ConvertOptions(layout=ParallelLayout(tp=2)))
        for model in (open_model(fp8), model_of_folder(open_announced(announced)))
    ]
    assert made[0].nbytes == made[1].nbytes
    assert [(f.name, f.size) for f in made[0].files] == [(f.name, f.size) for f in made[1].files]
    assert made[0].source.notes[0] in made[1].source.notes


def test_every_wide_model_has_ragged_blocks_of_unlike_scales() -> None:
    """What the tests above stand on."""
    assert set(WIDE) == set(FAMILIES)
    codes, scales = quantised(torch.randn(192, 320, generator=torch.Generator().manual_seed(0)), (128, 128))
    assert scales.shape == (2, 3)
    assert len(scales.unique()) == scales.numel()
    assert codes.float().abs().max() == 448
