"""Which class a mixture becomes, what is refused with what can, and the family that only Megatron has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ckptbridge.converters.convert import ConvertOptions, WrittenFormat, plan_conversion
from ckptbridge.converters.errors import NotSupportedError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.reshard import plan_reshard
from ckptbridge.converters.tensors import Checkpoint
from ckptbridge.converters.upcycling.construction import upcycled
from ckptbridge.converters.upcycling.factors import expert_factors
from ckptbridge.converters.upcycling.semantics import check
from tests.conftest import TinyFolders
from tests.converters.upcycle_cases import EXACT, TOLERANCE, spec_of, written
from tests.tiny import reference_logits, save_tiny, token_ids

REFUSED: dict[tuple[str, str, str], tuple[str, ...]] = {
    ("llama", "mixtral", "shared partition"): ("moe_shared_expert_intermediate_size is 48", "can: --to qwen2_moe"),
    ("llama", "mixtral", "every second layer"): ("moe_layer_freq", "can: --to qwen2_moe"),
    ("llama", "mixtral", "pre-softmax of zeros"): ("moe_router_pre_softmax", "can: --to qwen2_moe"),
    ("llama", "mixtral", "sigmoid"): ("moe_router_score_function", "can: --to glm4_moe"),
    ("llama", "qwen2_moe", "sigmoid, groups"): ("moe_router_score_function", "can: --to glm4_moe"),
    ("llama", "qwen3_moe", "copy E8G1T2"): ("qk_layernorm", "can: --to mixtral or --to qwen2_moe"),
    ("llama", "glm4_moe", "E4G4T4"): ("'softmax'", "can: --to mixtral or --to qwen2_moe"),
    ("llama", "granitemoe", "E4G4T4"): ("softmax_scale", "can: --to mixtral"),
    ("llama", "nemotron_moe", "E4G4T4"): ("normalization is 'RMSNorm'", "can: --to mixtral"),
    ("qwen2", "mixtral", "E4G4T4"): ("add_qkv_bias", "can: --to qwen2_moe"),
    ("qwen3", "qwen3_moe", "shared partition"): ("intermediate_size is 48", "can: --to glm4_moe with --router sigmoid"),
    ("qwen3", "hf", "shared partition"): ("Qwen2MoeForCausalLM: qk_layernorm", "--to glm4_moe with --router sigmoid"),
    ("qwen3", "mcore", "shared overlap"): ("no class computes", "can: --to glm4_moe with --router sigmoid"),
    ("mistral", "hf", "sigmoid"): ("Glm4MoeForCausalLM: window_size", "can: --to mixtral", "--router renormalised"),
    ("qwen3", "glm4_moe", "every second layer"): ("can: --to qwen3_moe",),
    ("nemotron", "hf", "E4G4T4"): ("NemotronMoeOfMegatronOnly: transformers has no such class", "can: --to mcore"),
    ("nemotron", "mixtral", "E4G4T4"): ("rotary_percent", "can: --to mcore"),
    ("nemotron", "nemotron_h", "E4G4T4"): ("does not turn heads", "RMSNorm", "mcore"),
    ("llama", "deepseek_v3", "sigmoid"): ("latents", "glm4_moe"),
    ("llama", "gemma", "E4G4T4"): ("not a mixture of experts", "mixtral, qwen2_moe, qwen3_moe, glm4_moe"),
    ("gemma", "hf", "E4G4T4"): ("MixtralForCausalLM: layernorm_zero_centered_gamma", "GraniteMoeForCausalLM: "),
    ("llama_biased", "mcore", "E4G4T4"): ("no class computes", "Qwen2MoeForCausalLM: add_proj_bias"),
    ("phi3_long", "hf", "E4G4T4"): ("MixtralForCausalLM: ", "can: --to glm4_moe with --router sigmoid"),
    ("olmo2", "mcore", "sigmoid"): ("Glm4MoeForCausalLM: ", "NemotronMoeOfMegatronOnly: normalization"),
    ("granite", "hf", "shared partition"): ("GraniteMoeForCausalLM: moe_shared_expert",),
}


@pytest.mark.parametrize(("name", "to", "kind"), REFUSED)
def test_what_a_class_cannot_say_is_refused_with_what_can(
    name: str, to: str, kind: str, tiny_folder: TinyFolders
) -> None:
    with pytest.raises(NotSupportedError) as refused:
        upcycled(open_model(tiny_folder(name)), spec_of(EXACT[kind], to=to))
    for word in REFUSED[name, to, kind]:
        assert word in str(refused.value)


FURTHER_SOURCES = [
    ("granite", "E4G4T4", "GraniteMoeForCausalLM"),
    ("phi3", "E4G4T8", "MixtralForCausalLM"),
    ("phi3", "shared overlap", "Qwen2MoeForCausalLM"),
    ("phi3_long", "sigmoid", "Glm4MoeForCausalLM"),
    ("qwen2_windowed", "shared partition", "Qwen2MoeForCausalLM"),
    ("qwen3_biased", "every second layer", "Qwen3MoeForCausalLM"),
]


@pytest.mark.parametrize(("name", "kind", "becomes"), FURTHER_SOURCES)
def test_other_dense_families_become_what_computes_the_same(
    name: str, kind: str, becomes: str, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    moe = upcycled(open_model(tiny_folder(name)), spec_of(EXACT[kind], to="hf"))
    assert moe.family.architecture == becomes
    expected = reference_logits(tiny_folder(name), token_ids())
    found = reference_logits(written(moe, tmp_path / "moe"), token_ids())
    assert (found - expected).abs().max() <= TOLERANCE


def test_notes_offer_the_class_with_an_fp32_router(tiny_folder: TinyFolders) -> None:
    mixtral = upcycled(open_model(tiny_folder("llama")), spec_of(EXACT["E4G4T4"])).notes
    assert any("0.2-0.4 %" in note and "--to glm4_moe --router sigmoid" in note for note in mixtral)
    assert not any(
        "0.2-0.4 %" in n for n in upcycled(open_model(tiny_folder("llama")), spec_of(EXACT["sigmoid"])).notes
    )
    copies = upcycled(open_model(tiny_folder("llama")), spec_of(EXACT["copy E8G1T2"])).notes
    assert not any("0.2-0.4 %" in note for note in copies)
    for one_group in ({"num_experts": 4, "topk": 2, "method": "split"}, EXACT["E1G4T4"]):
        mixture = upcycled(open_model(tiny_folder("llama")), spec_of(one_group))
        assert mixture.family.name == "mixtral"
        assert not any("0.2-0.4 %" in note for note in mixture.notes)
    nemotron = upcycled(open_model(tiny_folder("nemotron")), spec_of(EXACT["E4G4T4"])).notes
    assert any("Megatron alone" in note for note in nemotron)
    for kind, is_told in (("sigmoid, groups E4G4T8", True), ("sigmoid, groups", False), ("sigmoid", False)):
        notes = upcycled(open_model(tiny_folder("llama")), spec_of(EXACT[kind])).notes
        assert any("ranks a group" in note for note in notes) is is_told


def test_conditions_say_when_a_router_of_zeros_is_exact(tiny_folder: TinyFolders) -> None:
    config = open_model(tiny_folder("llama")).config
    zeros = check(spec_of(EXACT["pre-softmax of zeros"]).resolved(), config)
    assert zeros.is_exact
    assert any("stays zero" in condition for condition in zeros.conditions)
    assert any("neighbours" in condition for condition in zeros.conditions)
    copies = check(spec_of(EXACT["pre-softmax of zeros, copies"]).resolved(), config).conditions
    assert not any("neighbours" in condition for condition in copies)
    assert not any("zero" in c for c in check(spec_of(EXACT["E4G4T4"]).resolved(), config).conditions)


# ---- bits -----------------------------------------------------------------------------------------------------------


def _shards(tensors: Checkpoint, layer: int, group: int, granularity: int, matrix: str) -> list[Tensor]:
    stem = f"decoder.layers.{layer}.mlp.experts.experts"
    return [tensors[f"{stem}.{group * granularity + j}.{matrix}.weight"].read() for j in range(granularity)]


@pytest.mark.parametrize("granularity", [2, 4, 8])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("qwen3", {"router": "sigmoid"}),
        ("llama", {"router": "sigmoid", "scaling": "down"}),
        ("llama", {"router": "pre-softmax", "router_std": 0.0}),
        ("nemotron", {}),
        ("nemotron", {"router": "sigmoid"}),
        ("nemotron", {"router": "pre-softmax", "router_std": 0.0}),
    ],
    ids=str,
)
def test_bf16_weights_lose_no_bit(name: str, values: dict[str, Any], granularity: int, tmp_path: Path) -> None:
    dense = open_model(save_tiny(name, tmp_path / "dense", torch.bfloat16))
    spec = spec_of({"num_experts": 4 * granularity, "topk": 2 * granularity, "granularity": granularity} | values)
    moe = upcycled(dense, spec)
    factors = expert_factors(spec.resolved(), dense.config)
    assert factors.gate == 1
    if values == {"router": "sigmoid"}:
        assert (factors.up, factors.down) == (1, 1)
        assert moe.config.moe_router_topk_scaling_factor == granularity
    for layer in range(dense.config.num_layers):
        fc1, fc2 = (dense.tensors[f"decoder.layers.{layer}.mlp.linear_fc{number}.weight"].read() for number in (1, 2))
        for group in range(4):
            ups = _shards(moe.tensors, layer, group, granularity, "linear_fc1")
            downs = _shards(moe.tensors, layer, group, granularity, "linear_fc2")
            assert {tensor.dtype for tensor in (*ups, *downs)} == {torch.bfloat16}
            whole = torch.cat([(down.float() / factors.down).bfloat16() for down in downs], 1)
            assert torch.equal(whole, fc2)
            halves = fc1.chunk(2) if dense.config.gated_linear_unit else (fc1,)
            for part, (half, factor) in enumerate(zip(reversed(halves), (factors.up, 1.0), strict=False)):
                mine = [up.chunk(len(halves))[-1 - part] for up in ups]
                assert torch.equal(torch.cat([(up.float() / factor).bfloat16() for up in mine]), half)


# ---- the family that only Megatron has ------------------------------------------------------------------------------


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor.read() for name, tensor in open_model(folder).tensors.items()}


@pytest.mark.parametrize("to", ["torch_dist", "torch"])
@pytest.mark.parametrize("kind", ["E4G4T8", "sigmoid, groups", "shared partition", "first layers dense"])
def test_nemotrons_mixture_lives_in_megatrons_formats(
    kind: str, to: WrittenFormat, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    """Written, opened with and without its config.json, cut anew into the other format, and never for transformers."""
    moe = upcycled(open_model(tiny_folder("nemotron")), spec_of(EXACT[kind]))
    assert moe.family.name == "nemotron_moe"
    assert moe.tensors["decoder.layers.3.mlp.experts.experts.0.linear_fc1.weight"].shape[1] == 64
    expected = {name: tensor.read() for name, tensor in moe.tensors.items()}
    there = written(moe, tmp_path / "there", to, layout=ParallelLayout(tp=2, ep=2))
    other: WrittenFormat = "torch" if to == "torch_dist" else "torch_dist"
    layout = ConvertOptions(layout=ParallelLayout(pp=2, ep=4))
    execute(plan_reshard(open_model(there), tmp_path / "cut", other, layout))
    for folder in (there, tmp_path / "cut"):
        found = _tensors(folder)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    (there / "hf" / "config.json").unlink()
    opened = open_model(there)
    unused = {"ffn_hidden_size": opened.config.ffn_hidden_size} if moe.config.moe_layer_freq == 1 else {}
    assert (opened.family, opened.config) == (moe.family, replace(moe.config, **unused))
    for source in (moe, opened):
        with pytest.raises(NotSupportedError, match=r"no Hugging Face class.*NemotronH, has RMSNorm.*--to mcore"):
            plan_conversion(source, tmp_path / "hf", "hf")
