"""Planted faults in models with latent attention and a router of groups: the decoder's logits show each of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.mcore.args import BEYOND, make_args
from ckptbridge.converters.mcore.args_reading import config_from_args
from ckptbridge.converters.model import open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.trainer.observed import observe
from tests.conftest import TinyFolders
from tests.tiny import reference_logits, token_ids
from tests.trainer.test_every_family import LOGITS_TOLERANCE, decoder_logits

Tensors = dict[str, Tensor]
Fault = Callable[[Tensors, dict[str, Any]], None]
VISIBLE = 1e-3


def faulty(source: Path, target: Path, fault: Fault) -> Path:
    """A copy of a Hugging Face folder with a fault in its tensors or its config."""
    shutil.copytree(source, target)
    tensors, config = load_file(target / "model.safetensors"), json.loads((target / "config.json").read_text())
    fault(tensors, config)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(config))
    return target


def swap(one: str, other: str) -> Fault:
    def fault(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()

    return fault


def drop(name: str) -> Fault:
    def fault(tensors: Tensors, config: dict[str, Any]) -> None:
        del tensors[name]

    return fault


def change(name: str, to: Callable[[Tensor], Tensor]) -> Fault:
    def fault(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors[name] = to(tensors[name])

    return fault


def tell(**values: Any) -> Fault:
    def fault(tensors: Tensors, config: dict[str, Any]) -> None:
        for name, value in values.items():
            (config["rope_parameters"] if name in config["rope_parameters"] else config)[name] = value

    return fault


def transposed(matrix: Tensor) -> Tensor:
    return matrix.T.reshape(matrix.shape)


_ATTENTION, _MLP = "model.layers.1.self_attn", "model.layers.2.mlp"
DEEPSEEK_V3: dict[str, Fault] = {
    "gate and up of the shared experts": swap(
        f"{_MLP}.shared_experts.gate_proj.weight", f"{_MLP}.shared_experts.up_proj.weight"
    ),
    "two experts": swap(f"{_MLP}.experts.1.down_proj.weight", f"{_MLP}.experts.6.down_proj.weight"),
    "order of the router": change(f"{_MLP}.gate.weight", lambda w: w.roll(1, 0)),
    "order of the expert bias": change(f"{_MLP}.gate.e_score_correction_bias", lambda b: b.roll(1)),
    "order of query heads": change(f"{_ATTENTION}.q_b_proj.weight", lambda w: w.roll(20, 0)),
    "position before the rest": change(f"{_ATTENTION}.kv_a_proj_with_mqa.weight", lambda w: w.roll(8, 0)),
    "values before keys": change(f"{_ATTENTION}.kv_b_proj.weight", lambda w: w.roll(12, 0)),
    "transposed output": change(f"{_ATTENTION}.o_proj.weight", transposed),
    "norm of the latent": change(f"{_ATTENTION}.kv_a_layernorm.weight", lambda w: w.flip(0)),
    "base of the rotation": tell(rope_theta=20000.0),
    "scale of long contexts": tell(mscale_all_dim=0.0),
    "factor of the weights": tell(routed_scaling_factor=1.0),
    "groups": tell(topk_group=1),
    "weights that sum to one": tell(norm_topk_prob=False),
}


DEEPSEEK_V2: dict[str, Fault] = {
    "queries without position behind": change(f"{_ATTENTION}.q_proj.weight", lambda w: w.roll(8, 0)),
    "two experts": swap(f"{_MLP}.experts.1.up_proj.weight", f"{_MLP}.experts.6.up_proj.weight"),
    "order of the router": change(f"{_MLP}.gate.weight", lambda w: w.roll(1, 0)),
    "factor of the weights": tell(routed_scaling_factor=2.0),
    "groups": tell(topk_method="group_limited_greedy", n_group=4, topk_group=1),
}
GLM4_MOE: dict[str, Fault] = {
    "order of query heads": change(f"{_ATTENTION}.q_proj.weight", lambda w: w.roll(16, 0)),
    "keys for values": swap(f"{_ATTENTION}.k_proj.weight", f"{_ATTENTION}.v_proj.weight"),
    "biases of keys and values": swap(f"{_ATTENTION}.k_proj.bias", f"{_ATTENTION}.v_proj.bias"),
    "norms of queries and keys": swap(f"{_ATTENTION}.q_norm.weight", f"{_ATTENTION}.k_norm.weight"),
    "gate and up of an expert": swap(f"{_MLP}.experts.2.gate_proj.weight", f"{_MLP}.experts.2.up_proj.weight"),
    "order of the expert bias": change(f"{_MLP}.gate.e_score_correction_bias", lambda b: b.roll(1)),
    "part that turns": tell(partial_rotary_factor=1.0),
    "base of the rotation": tell(rope_theta=20000.0),
    "factor of the weights": tell(routed_scaling_factor=1.0),
}
FAULTS = [
    *(("deepseek_v3", fault) for fault in DEEPSEEK_V3),
    *(("deepseek_v2_lite", fault) for fault in DEEPSEEK_V2),
    *(("glm4_moe", fault) for fault in GLM4_MOE),
]
_BY_NAME = {"deepseek_v3": DEEPSEEK_V3, "deepseek_v2_lite": DEEPSEEK_V2, "glm4_moe": GLM4_MOE}


@pytest.mark.parametrize(("name", "fault"), FAULTS, ids=[f"{name}: {fault}" for name, fault in FAULTS])
def test_a_planted_fault_shows_in_the_logits(name: str, fault: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    expected = reference_logits(tiny_folder(name), token_ids())
    found = decoder_logits(faulty(tiny_folder(name), tmp_path / "faulty", _BY_NAME[name][fault]))
    assert (found - expected).abs().max() > VISIBLE


def test_neighbours_that_turn_against_each_other_are_no_halves(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    """The class can also turn halves; files for it are refused rather than turned wrongly."""
    halves = faulty(tiny_folder("deepseek_v3"), tmp_path / "halves", tell(rope_interleave=False))
    expected = reference_logits(tiny_folder("deepseek_v3"), token_ids())
    assert (reference_logits(halves, token_ids()) - expected).abs().max() > VISIBLE
    with pytest.raises(BadInputError, match="rope_interleave"):
        open_model(halves)


FURTHER_LAYER = {
    "enorm.weight": "enorm.weight",
    "hnorm.weight": "hnorm.weight",
    "eh_proj.weight": "eh_proj.weight",
    "shared_head.norm.weight": "final_layernorm.weight",
    "input_layernorm.weight": "transformer_layer.input_layernorm.weight",
    "post_attention_layernorm.weight": "transformer_layer.pre_mlp_layernorm.weight",
    "self_attn.q_a_proj.weight": "transformer_layer.self_attention.linear_q_down_proj.weight",
    "mlp.gate.e_score_correction_bias": "transformer_layer.mlp.router.expert_bias",
    "mlp.experts.3.down_proj.weight": "transformer_layer.mlp.experts.experts.3.linear_fc2.weight",
}


def test_the_tensors_of_further_layers_stand_under_megatrons_names(tiny_folder: TinyFolders) -> None:
    """No logit reads them, and megatron-core only checks names and shapes: here are the values."""
    tensors = load_file(tiny_folder("deepseek_v3") / "model.safetensors")
    made = open_model(tiny_folder("deepseek_v3")).tensors
    for number in range(2):
        for hf, mcore in FURTHER_LAYER.items():
            assert torch.equal(made[f"mtp.layers.{number}.{mcore}"].read(), tensors[f"model.layers.{4 + number}.{hf}"])


@pytest.mark.parametrize("copy", ["embed_tokens.weight", "shared_head.head.weight"])
def test_a_copy_that_differs_is_refused_and_one_that_is_missing_is_not(
    copy: str, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    name = f"model.layers.5.{copy}"
    other = faulty(tiny_folder("deepseek_v3"), tmp_path / "other", change(name, lambda w: w + 1))
    with pytest.raises(BadInputError, match=f"{name} differs from "):
        open_model(other)
    without = faulty(tiny_folder("deepseek_v3"), tmp_path / "without", drop(name))
    expected = reference_logits(tiny_folder("deepseek_v3"), token_ids())
    assert (decoder_logits(without) - expected).abs().max() <= LOGITS_TOLERANCE
    assert any(name in note for note in open_model(without).notes)


def test_further_layers_that_are_not_there_are_left_out_and_said_so(tiny_folder: TinyFolders) -> None:
    model = open_model(tiny_folder("deepseek_v3_saved"))
    assert model.config.mtp_num_layers == 0
    assert any("layers that predict further tokens" in note for note in model.notes)


def test_the_expert_bias_keeps_its_numbers_in_a_decoder_of_16_bits(tiny_folder: TinyFolders) -> None:
    from ckptbridge.converters.model import decoder_tensors
    from ckptbridge.trainer.loading import empty_decoder, load_weights

    source = open_model(tiny_folder("deepseek_v3"))
    decoder = empty_decoder(source.config, "reference", torch.bfloat16, torch.device("cpu"))
    load_weights(decoder, decoder_tensors(source.tensors, source.config))
    bias = decoder.get_parameter("decoder.layers.2.mlp.router.expert_bias")
    assert torch.equal(bias, source.tensors["decoder.layers.2.mlp.router.expert_bias"].read())


def test_a_checkpoint_with_megatrons_own_arguments_is_understood(tiny_folder: TinyFolders) -> None:
    """Megatron-LM keeps another width of heads, and a flag of the router that it does not read for sigmoids."""
    config = open_model(tiny_folder("deepseek_v3")).config
    args = make_args(
        config, padded_vocab_size=256, layout=ParallelLayout(), dtype=torch.float32, ckpt_format="torch_dist"
    )
    delattr(args, BEYOND)
    args.kv_channels, args.moe_router_pre_softmax = config.hidden_size // config.num_attention_heads, True
    assert config_from_args(args, "args") == config


@torch.no_grad()
def test_verify_takes_further_layers_that_transformers_ignores(tiny_folder: TinyFolders) -> None:
    source, chunks = open_model(tiny_folder("glm4_moe")), []
    ids_T = token_ids(batch=1)[0]
    observe(source, ids_T, torch.float32, lambda stage, x: None, lambda start, logits: chunks.append(logits))
    expected = reference_logits(tiny_folder("glm4_moe"), ids_T[None])[0]
    assert (torch.cat(chunks) - expected).abs().max() <= LOGITS_TOLERANCE
