"""MXFP4 weights are read as transformers dequantises them, to the last bit; what does not fit together is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ckptbridge.converters.announced import open_announced
from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.hf_folder import INDEX, open_hf_folder, read_json
from ckptbridge.converters.model import open_model
from ckptbridge.converters.mxfp4 import Mxfp4
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.tensors import InMemory
from tests.conftest import TinyFolders
from tests.converters.test_every_family import tensors_of

STACKS = ("gate_up_proj", "down_proj")


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, object]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def both(source: Path, folder: Path) -> tuple[Path, Path]:
    """A model in MXFP4, and the same one as transformers dequantises it."""
    generator = torch.Generator().manual_seed(3)
    packed: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors_of(source).items():
        if not name.endswith(STACKS):
            packed[name] = plain[name] = tensor.bfloat16()
            continue
        experts, columns, height = tensor.shape
        shape = (experts, height, columns // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(118, 126, shape, dtype=torch.uint8, generator=generator)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = convert_moe_packed_tensors(blocks, scales)
    config = read_json(source / "config.json") | {"dtype": "bfloat16"}
    told = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return (
        write(folder / "mxfp4", packed, config | {"quantization_config": told}),
        write(folder / "plain", plain, config),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_byte_under_every_scale(dtype: torch.dtype) -> None:
    """All 255 scales, the smallest and the largest included, with every pair of numbers."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(255, 1, 1)
    scales = torch.arange(255, dtype=torch.uint8)[:, None].repeat(1, 16)
    expected = convert_moe_packed_tensors(blocks[None], scales[None], dtype=torch.float64)[0].T
    lazy = Mxfp4(InMemory(blocks.flatten(1)), InMemory(scales), dtype, where="test")
    assert torch.equal(lazy.read(), expected.to(dtype))
    assert torch.equal(lazy.read_rows(7, 9), expected.to(dtype)[7:9])


@pytest.mark.parametrize("layout", [ParallelLayout(), ParallelLayout(tp=2, pp=2, ep=2, etp=1)], ids=["one", "split"])
def test_a_model_is_converted_as_its_bf16_form_is(
    layout: ParallelLayout, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    quantised, plain = both(tiny_folder("gpt_oss"), tmp_path)
    for folder in (quantised, plain):
        options = ConvertOptions(layout=layout)
        execute(plan_conversion(open_model(folder), tmp_path / f"{folder.name}.mcore", "torch_dist", options))
    made, expected = (open_model(tmp_path / f"{folder.name}.mcore").tensors for folder in (quantised, plain))
    assert made.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(made[name].read().view(torch.uint8), tensor.read().view(torch.uint8)), name
    execute(plan_conversion(open_model(tmp_path / "mxfp4.mcore"), tmp_path / "back", "hf", ConvertOptions()))
    back = tensors_of(tmp_path / "back")
    for name, tensor in tensors_of(plain).items():
        assert torch.equal(back[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
    assert read_json(tmp_path / "back" / "config.json") == read_json(plain / "config.json")


def test_the_weights_are_never_turned_twice(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    """Files hold the rows that Megatron wants: reading an expert reads its own bytes alone, in order."""
    model = open_model(both(tiny_folder("gpt_oss"), tmp_path)[0])
    assert "Turned" not in repr(
        [type(base) for base in model.tensors["decoder.layers.0.mlp.experts.experts.3.linear_fc2.weight"].bases()]
    )
    assert any("MXFP4" in note for note in model.notes)


_GATE = "model.layers.1.mlp.experts.gate_up_proj"
Change = Callable[[dict[str, Tensor]], object]
REFUSED: dict[str, tuple[Change, tuple[str, ...]]] = {
    "scales without blocks": (lambda t: t.pop(f"{_GATE}_blocks"), (f"{_GATE}_blocks", f"{_GATE}_scales")),
    "blocks without scales": (lambda t: t.pop(f"{_GATE}_scales"), (f"{_GATE}_blocks", f"{_GATE}_scales")),
    "scales of another shape": (
        lambda t: t.update({f"{_GATE}_scales": t[f"{_GATE}_scales"][:, :-1].contiguous()}),
        (f"{_GATE}_blocks", f"{_GATE}_scales"),
    ),
    "scales of another kind": (
        lambda t: t.update({f"{_GATE}_scales": t[f"{_GATE}_scales"].float()}),
        (f"{_GATE}_scales", "uint8"),
    ),
    "the weight beside them": (lambda t: t.update({_GATE: torch.zeros(8, 64, 192)}), (f"'{_GATE}'", "twice")),
    "too few rows": (
        lambda t: t.update({n: t[n][:, :-2].contiguous() for n in (f"{_GATE}_blocks", f"{_GATE}_scales")}),
        (_GATE, "[8, 64, 192]", "[8, 64, 190]"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_together_is_refused(case: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    folder, _ = both(tiny_folder("gpt_oss"), tmp_path)
    tensors = tensors_of(folder)
    change, words = REFUSED[case]
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BadInputError) as refused:
        open_model(folder)
    assert all(word in str(refused.value) for word in words), refused.value


def test_a_scale_that_is_no_number_ends_the_conversion(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    folder, _ = both(tiny_folder("gpt_oss"), tmp_path)
    tensors = tensors_of(folder)
    tensors[f"{_GATE}_scales"][2, 5, 1] = 255
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BadInputError, match=r"gate_up_proj_scales.*255"):
        execute(plan_conversion(open_model(folder), tmp_path / "out", "torch_dist", ConvertOptions()))


def test_a_field_that_is_not_understood_is_refused(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    folder, _ = both(tiny_folder("gpt_oss"), tmp_path)
    config = read_json(folder / "config.json")
    config["quantization_config"]["group_size"] = 16
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(NotSupportedError, match="group_size"):
        open_model(folder)


def test_the_index_alone_is_enough_for_a_plan(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    folder, _ = both(tiny_folder("gpt_oss"), tmp_path)
    stored = open_hf_folder(folder).tensors
    (tmp_path / "announced").mkdir()
    (tmp_path / "announced" / "config.json").write_bytes((folder / "config.json").read_bytes())
    weight_map = dict.fromkeys(stored, "model-00001-of-00001.safetensors")
    (tmp_path / "announced" / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    announced = open_announced(tmp_path / "announced").tensors
    assert {n: (t.shape, t.dtype) for n, t in announced.items()} == {n: (t.shape, t.dtype) for n, t in stored.items()}
