"""Mistakes that a conversion of GPT-OSS could make, each planted in its weights or its config: the logits show them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ckptbridge.converters.hf_folder import read_json
from tests.conftest import TinyFolders
from tests.converters.test_every_family import tensors_of
from tests.tiny import reference_logits, token_ids
from tests.trainer.test_every_family import LOGITS_TOLERANCE, decoder_logits

CAUGHT = 1e-3
_LAYER = "model.layers.1"
_EXPERTS = f"{_LAYER}.mlp.experts"


def _swapped_pairs(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def _one_after_the_other(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 2)).mT.flatten(-2)


def _first_two_swapped(x: Tensor) -> Tensor:
    return torch.cat([x[1:2], x[:1], x[2:]])


FAULTS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "gate and up swapped": (f"{_EXPERTS}.gate_up_proj", _swapped_pairs),
    "gate and up not in turn": (f"{_EXPERTS}.gate_up_proj", _one_after_the_other),
    "their biases swapped": (f"{_EXPERTS}.gate_up_proj_bias", _swapped_pairs),
    "their biases not in turn": (f"{_EXPERTS}.gate_up_proj_bias", _one_after_the_other),
    "two experts swapped": (f"{_EXPERTS}.gate_up_proj", _first_two_swapped),
    "two experts' biases swapped": (f"{_EXPERTS}.down_proj_bias", _first_two_swapped),
    "an expert by rows": (f"{_EXPERTS}.down_proj", lambda x: x.mT.reshape(x.shape)),
    "the router in another order": (f"{_LAYER}.mlp.router.weight", _first_two_swapped),
    "the router without biases": (f"{_LAYER}.mlp.router.bias", torch.zeros_like),
    "sinks dropped": (f"{_LAYER}.self_attn.sinks", lambda x: torch.full_like(x, -50.0)),
    "sinks of other heads": (f"{_LAYER}.self_attn.sinks", _first_two_swapped),
    "a projection without its bias": (f"{_LAYER}.self_attn.o_proj.bias", torch.zeros_like),
    "keys without their bias of values": (f"{_LAYER}.self_attn.v_proj.bias", torch.zeros_like),
}


def _config(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda config: config | changes


CONFIG_FAULTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "the window in the other layers": lambda config: config | {"layer_types": config["layer_types"][::-1]},
    "another window": _config(sliding_window=8),
    "another clamp": _config(swiglu_limit=7.0),
    "another base": lambda c: c | {"rope_parameters": c["rope_parameters"] | {"rope_theta": 10000.0}},
    "another factor": lambda c: c | {"rope_parameters": c["rope_parameters"] | {"factor": 4.0}},
    "a truncated ramp": lambda c: c | {"rope_parameters": c["rope_parameters"] | {"truncate": True}},
    "one expert fewer": _config(num_experts_per_tok=2),
}


def difference(source: Path, folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> float:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return (decoder_logits(folder) - reference_logits(source, token_ids())).abs().max().item()


def test_without_a_fault_nothing_differs(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = tiny_folder("gpt_oss")
    found = difference(source, tmp_path / "same", tensors_of(source), read_json(source / "config.json"))
    assert found <= LOGITS_TOLERANCE


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_weights_shows(fault: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source, (name, change) = tiny_folder("gpt_oss"), FAULTS[fault]
    tensors = tensors_of(source)
    tensors[name] = change(tensors[name])
    assert difference(source, tmp_path / "bad", tensors, read_json(source / "config.json")) > CAUGHT


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_a_fault_in_the_config_shows(fault: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = tiny_folder("gpt_oss")
    config = CONFIG_FAULTS[fault](read_json(source / "config.json"))
    assert difference(source, tmp_path / "bad", tensors_of(source), config) > CAUGHT
