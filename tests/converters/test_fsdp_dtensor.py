"""fsdp_dtensor folders that torch.distributed.checkpoint writes here: names, halves, and everything that can be wrong.

What the real Megatron-FSDP writes, chunk by chunk, is tests/megatron/test_megatron_fsdp.py.
"""

from __future__ import annotations

import pickle
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from ckptbridge.converters.convert import plan_conversion
from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.formats import detect_format
from ckptbridge.converters.mcore.args import make_args
from ckptbridge.converters.model import open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from tests.conftest import TinyFolders
from tests.tiny import TINY

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process writes these folders

State = dict[str, Any]
HALF = "model.module.decoder.layers.1.mlp.linear_fc1.weight_v"


def state_of(hf: Path) -> State:
    """What Megatron-LM hands to torch for a model of Transformer Engine's modules, on one rank."""
    source = open_model(hf)
    state: State = {}
    for name, tensor in source.tensors.items():
        key = re.sub(r"experts\.experts\.(\d+)\.(linear_fc[12]\.weight)", r"experts.\2\1", f"model.module.{name}")
        value = tensor.read()
        if "vocab" in key or key.endswith(("word_embeddings.weight", "output_layer.weight")):
            value = torch.cat([value, torch.zeros(6, value.shape[1])])
        if "linear_fc1.weight" in key:
            state[f"{key}_w"], state[f"{key}_v"] = (half.clone() for half in value.chunk(2))
        else:
            state[key] = value
    args = make_args(
        source.config, padded_vocab_size=256, layout=ParallelLayout(), dtype=source.dtype, ckpt_format="fsdp_dtensor"
    )
    return {"args": args, "iteration": 40, "checkpoint_version": 3.0, **state}


def written(state: State, folder: Path) -> Path:
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return folder


@pytest.fixture
def state(tiny_folder: TinyFolders) -> State:
    return state_of(tiny_folder("llama"))


@pytest.fixture
def hf(tiny_folder: TinyFolders) -> Path:
    return tiny_folder("llama")


@pytest.mark.parametrize("name", TINY)
def test_names_of_transformer_engine_come_back_bit_for_bit(tiny_folder: TinyFolders, tmp_path: Path, name: str) -> None:
    folder = written(state_of(tiny_folder(name)), tmp_path / "fsdp")
    assert detect_format(folder) == "fsdp_dtensor"
    source = open_model(folder, hf_config=tiny_folder(name))
    assert source.iteration == 40
    execute(plan_conversion(source, tmp_path / "hf", "hf"))
    expected = {k: v for f in tiny_folder(name).glob("*.safetensors") for k, v in load_file(f).items()}
    found = {k: v for f in (tmp_path / "hf").glob("*.safetensors") for k, v in load_file(f).items()}
    assert found.keys() == expected.keys()
    assert not [key for key in expected if not torch.equal(found[key], expected[key])]


def _without(key: str) -> Callable[[State], None]:
    return lambda state: state.pop(key)


def _with(**values: Any) -> Callable[[State], None]:
    return lambda state: state.update({key.replace("__", "."): value for key, value in values.items()})


def _joined(state: State, **args: Any) -> None:
    """As --ckpt-format torch_dcp keeps it: the halves of linear_fc1 in one."""
    for key in [key for key in state if key.endswith("_w")]:
        state[key[:-2]] = torch.cat([state.pop(key), state.pop(f"{key[:-2]}_v")])
    vars(state["args"]).update(args)


def _chunked(state: State) -> None:
    for key in [key for key in state if key.startswith("model.")]:
        state[key.replace("model.", "model0.", 1)] = state.pop(key)


def _stages(state: State) -> None:
    state["args"].pipeline_model_parallel_size = 2


def _bare(state: State) -> None:
    for key in [key for key in state if key.startswith("model.")]:
        state[key.removeprefix("model.module.")] = state.pop(key)


def _narrow(state: State) -> None:
    state[HALF] = state[HALF][:40].clone()


def _one_name_twice(state: State) -> None:
    state["model.module.decoder.layers.0.input_layernorm.weight"] = torch.ones(64)


WRONG: dict[str, tuple[Callable[[State], None], type[Exception], str]] = {
    "a half is missing": (_without(HALF), BadInputError, r"weight_w is there without its other half \(_v\)"),
    "halves differ": (_narrow, BadInputError, r"has shape \[96, 64\], but .*weight_v has \[40, 64\]"),
    "a tensor is missing": (
        _without("model.module.decoder.final_layernorm.weight"),
        BadInputError,
        r"1 missing: decoder\.final_layernorm\.weight",
    ),
    "a tensor too many": (
        _with(model__module__decoder__layers__1__mlp__router__weight=torch.ones(4, 64)),
        BadInputError,
        r"1 unexpected: model\.module\.decoder\.layers\.1\.mlp\.router\.weight",
    ),
    "a key with braces": (
        lambda state: state.update({"model.module.decoder.layers.1.mlp.{layer}}.{0.x": torch.ones(4)}),
        BadInputError,
        r"1 unexpected: model\.module\.decoder\.layers\.1\.mlp\.",
    ),
    "another shape": (
        _with(model__module__decoder__final_layernorm__weight=torch.ones(65)),
        BadInputError,
        r"final_layernorm\.weight: expected shape \[64\] from the config, found \[65\]",
    ),
    "whole and in halves": (
        _with(model__module__decoder__layers__1__mlp__linear_fc1__weight=torch.ones(192, 64)),
        BadInputError,
        "is there whole and in halves",
    ),
    "one parameter under two names": (_one_name_twice, BadInputError, r"are both decoder\.layers\.0\.self_attention"),
    "a virtual pipeline": (_chunked, NotSupportedError, "holds the model in chunks"),
    "a pipeline": (_stages, NotSupportedError, "pipeline parallel size of 2: every stage counts its layers from 0"),
    "joined over ranks": (
        lambda state: _joined(state, tensor_model_parallel_size=2),
        NotSupportedError,
        "torch_dcp writes them; it is read where args say a tensor parallel size of 1",
    ),
    "an interrupted torch_dist": (_bare, BadInputError, r"metadata\.json is missing"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_wrong_is_told(state: State, hf: Path, tmp_path: Path, fault: str) -> None:
    change, error, told = WRONG[fault]
    change(state)
    folder = written(state, tmp_path / "fsdp")
    with pytest.raises(error, match=told) as raised:
        open_model(folder, hf_config=hf)
    assert str(folder) in str(raised.value)


def test_torch_dcp_of_one_tensor_parallel_rank_is_read(state: State, hf: Path, tmp_path: Path) -> None:
    _joined(state)
    source = open_model(written(state, tmp_path / "dcp"), hf_config=hf)
    expected = open_model(hf)
    assert not [k for k, t in source.tensors.items() if not torch.equal(t.read(), expected.tensors[k].read())]


def test_without_args_it_asks_for_a_config(state: State, hf: Path, tmp_path: Path) -> None:
    del state["args"]
    folder = written(state, tmp_path / "fsdp")
    with pytest.raises(BadInputError, match="--hf-config"):
        open_model(folder)
    assert open_model(folder, hf_config=hf).config == open_model(hf).config


def test_args_that_are_no_args_are_not_taken_for_some(state: State, tmp_path: Path) -> None:
    state["args"] = vars(state["args"])
    with pytest.raises(BadInputError, match="--hf-config"):
        open_model(written(state, tmp_path / "fsdp"))


def test_hostile_args_are_refused_by_name(state: State, tmp_path: Path) -> None:
    state["args"] = Namespace(attack=pickle.Pickler)
    with pytest.raises(NotSupportedError, match="Pickler"):
        open_model(written(state, tmp_path / "fsdp"))


def test_a_chunk_that_is_missing_is_told(state: State, hf: Path, tmp_path: Path) -> None:
    folder = written(state, tmp_path / "fsdp")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.state_dict_metadata[HALF].chunks.clear()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(BadInputError, match=r"linear_fc1\.weight_v.*chunks hold 0 elements"):
        open_model(folder, hf_config=hf)


@pytest.mark.parametrize("length", [None, 0, 1000])
def test_a_file_that_is_missing_or_short_is_told(state: State, hf: Path, tmp_path: Path, length: int | None) -> None:
    folder = written(state, tmp_path / "fsdp")
    (file,) = folder.glob("*.distcp")
    if length is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(BadInputError, match=r"missing from|truncated"):
        open_model(folder, hf_config=hf)
