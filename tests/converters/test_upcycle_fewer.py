"""Fewer experts: pruned by load, or merged by what their routers answer to."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.model import Model, open_model
from ckptbridge.converters.upcycling.clusters import clusters_of
from ckptbridge.converters.upcycling.construction import upcycled
from ckptbridge.converters.upcycling.measured import LayerMeasurement, Measured, MixtureSample
from ckptbridge.converters.upcycling.mixture_measuring import measure_mixture_layer, mixture_needs_text
from ckptbridge.converters.upcycling.semantics import check
from ckptbridge.converters.upcycling.spec import UpcycleSpec
from tests.conftest import TinyFolders
from tests.converters.mixture_samples import load, router_inputs, samples
from tests.converters.test_upcycle import TOLERANCE, weights, written
from tests.converters.test_upcycle_copies import deviation
from tests.tiny import reference_logits, token_ids

ROUTERS = {
    "mixtral": "block_sparse_moe.gate.weight",
    "qwen2_moe_normalised": "mlp.gate.weight",
    "qwen3_moe": "mlp.gate.weight",
    "olmoe": "mlp.gate.weight",
}
UNMET = (0, 2)
"""Experts that no token of the text meets, in every layer."""


def spec(method: str, experts: int, **values: Any) -> UpcycleSpec:
    return UpcycleSpec(**{"num_experts": experts, "method": method, **values})


def measured(made: UpcycleSpec, model: Model, folder: Path) -> Measured:
    return {
        layer: measure_mixture_layer(made.resolved(), model.config, sample)
        for layer, sample in samples(model, folder).items()
    }


def without_text(name: str, source: Path, target: Path) -> Path:
    """A copy of a folder whose routers give UNMET less than any other expert, for every token of the text.

    There are fewer tokens than channels, so that a row with any wanted logits exists.
    """
    shutil.copytree(source, target)
    loaded = load(source)
    rows: dict[str, Tensor] = {}
    for layer in range(loaded.config.num_hidden_layers):
        input_TH = router_inputs(loaded, layer)
        row_H = torch.linalg.lstsq(input_TH.double(), torch.full((len(input_TH), 1), -30.0).double()).solution[:, 0]
        weight = loaded.model.layers[layer].mlp.gate.weight
        with torch.no_grad():
            weight[list(UNMET)] = row_H.float()
        rows[f"model.layers.{layer}.{ROUTERS[name]}"] = weight.detach().clone()
    for file in target.glob("*.safetensors"):
        held = load_file(file)
        save_file({key: rows.get(key, tensor) for key, tensor in held.items()}, file, {"format": "pt"})
    return target


@pytest.mark.parametrize("name", ROUTERS)
def test_experts_that_no_token_met_are_not_missed(name: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    folder = without_text(name, tiny_folder(name), tmp_path / "source")
    source = open_model(folder)
    experts = source.config.num_moe_experts or 0
    made = spec("prune", experts - len(UNMET))
    found = measured(made, source, folder)
    for measurement in found.values():
        assert measurement.order is not None
        assert measurement.order.tolist() == [expert for expert in range(experts) if expert not in UNMET]
    fewer = written(upcycled(source, made, found), tmp_path / "fewer")
    assert deviation(fewer, folder) <= TOLERANCE
    busy = {**found, 1: LayerMeasurement(order=torch.arange(experts - len(UNMET)))}
    assert deviation(written(upcycled(source, made, busy), tmp_path / "busy"), folder) > 3 * TOLERANCE
    back = open_model(fewer)
    assert (back.config.num_moe_experts, back.config.moe_router_topk) == (
        experts - 2,
        min(source.config.moe_router_topk, experts - 2),
    )


@pytest.mark.parametrize("name", ["glm4_moe_air", "deepseek_v3_saved"])
def test_experts_whose_bias_keeps_them_out_are_not_missed(name: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    shutil.copytree(tiny_folder(name), folder)
    held = load_file(folder / "model.safetensors")
    for key in held:
        if key.endswith("e_score_correction_bias"):
            held[key][list(UNMET)] = -9.0
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    source = open_model(folder)
    made = spec("prune", (source.config.num_moe_experts or 0) - len(UNMET))
    found, bias = measured(made, source, folder), "decoder.layers.2.mlp.router.expert_bias"
    pruned = upcycled(source, made, found)
    assert deviation(written(pruned, tmp_path / "fewer"), folder) <= TOLERANCE
    order = found[2].order
    assert order is not None
    assert torch.equal(pruned.tensors[bias].read(), source.tensors[bias].read()[order])


def test_each_group_of_experts_keeps_as_many(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = open_model(tiny_folder("deepseek_v2"))
    made = spec("prune", 8)
    found = measured(made, source, tiny_folder("deepseek_v2"))
    for layer, sample in samples(source, tiny_folder("deepseek_v2")).items():
        order = found[layer].order
        assert order is not None
        assert [number // 4 for number in order.tolist()] == [0, 0, 1, 1, 2, 2, 3, 3]
        for kept, own in zip(order.view(4, 2), sample.weights_N.view(4, 4), strict=True):
            assert sorted(own[kept % 4].tolist()) == sorted(own.tolist())[2:]
    back = open_model(written(upcycled(source, made, found), tmp_path / "fewer"))
    assert (back.config.moe_router_num_groups, back.config.num_moe_experts) == (4, 8)
    assert reference_logits(tmp_path / "fewer", token_ids()).isfinite().all()


def test_the_busiest_are_kept_and_ties_go_by_tokens_and_number() -> None:
    sample = _sample(weights_N=[1.0, 3.0, 1.0, 0.5], rows_N=[2, 3, 4, 9])
    config = open_config(4)
    for count, kept in ((1, [1]), (2, [1, 2]), (3, [0, 1, 2])):
        order = measure_mixture_layer(spec("prune", count).resolved(), config, sample).order
        assert order is not None
        assert order.tolist() == kept
    order = measure_mixture_layer(spec("expert-upcycling", 6).resolved(), config, sample).order
    assert order is not None
    assert order.tolist() == [0, 1, 2, 3, 1, 1]  # a load of 3, of 3 / 2 each, then 1
    assert mixture_needs_text(spec("expert-upcycling", 7), config)
    assert not mixture_needs_text(spec("expert-upcycling", 8), config)


def open_config(experts: int) -> Any:
    from ckptbridge.converters.model_config import ModelConfig

    sizes: dict[str, Any] = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1}
    sizes |= {"num_query_groups": 1, "kv_channels": 8, "vocab_size": 8, "moe_ffn_hidden_size": 8}
    return ModelConfig(**sizes, num_moe_experts=experts)


def _sample(weights_N: list[float], rows_N: list[int], logits_TN: Tensor | None = None) -> MixtureSample:
    experts = len(rows_N)
    return MixtureSample(
        layer=0,
        input_TH=torch.zeros(5, 8),
        rows_N=torch.tensor(rows_N),
        weights_N=torch.tensor(weights_N),
        logits_TN=torch.zeros(5, experts) if logits_TN is None else logits_TN,
    )


# ---- merging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss", "glm4_moe_air", "deepseek_v3_saved"])
def test_copies_merge_into_what_they_were_copied_from(name: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = open_model(tiny_folder(name))
    experts, topk = source.config.num_moe_experts or 0, source.config.moe_router_topk
    doubled = written(upcycled(source, spec("expert-upcycling", 2 * experts)), tmp_path / "doubled")
    more, made = open_model(doubled), spec("merge", experts, topk=topk)
    found = measured(made, more, doubled)
    merged = written(upcycled(more, made, found), tmp_path / "merged")
    mine, theirs = weights(merged), weights(tiny_folder(name))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert deviation(merged, tiny_folder(name)) == 0
    order = found[2].order
    assert order is not None
    swapped = order.clone()
    swapped[[experts, experts + 1]] = order[[experts + 1, experts]]
    wrong = {**found, 2: replace(found[2], order=swapped)}
    assert deviation(written(upcycled(more, made, wrong), tmp_path / "wrong"), tiny_folder(name)) > 3 * TOLERANCE


def test_experts_merge_by_their_load(tiny_folder: TinyFolders) -> None:
    source = open_model(tiny_folder("mixtral"))
    loads = torch.tensor([1.0, 0.0, 3.0, 0.0])
    found = {layer: LayerMeasurement(order=torch.tensor([0, 1, 0, 1]), weights=loads) for layer in range(4)}
    merged = upcycled(source, spec("merge", 2), found)
    stem = "decoder.layers.1.mlp.experts.experts"
    for part in ("linear_fc1.weight", "linear_fc2.weight"):
        old = [source.tensors[f"{stem}.{expert}.{part}"].read().double() for expert in range(4)]
        assert torch.equal(merged.tensors[f"{stem}.0.{part}"].read(), (old[0] / 4 + old[2] * 0.75).float())
        assert torch.equal(merged.tensors[f"{stem}.1.{part}"].read(), ((old[1] + old[3]) / 2).float())
        whole = merged.tensors[f"{stem}.0.{part}"]
        assert torch.equal(whole.read_rows(3, 11), whole.read()[3:11])
    rows = source.tensors["decoder.layers.1.mlp.router.weight"].read().double()
    made = merged.tensors["decoder.layers.1.mlp.router.weight"].read()
    assert torch.equal(made, torch.stack([rows[0] / 4 + rows[2] * 0.75, (rows[1] + rows[3]) / 2]).float())
    halves = merged.tensors[f"{stem}.0.linear_fc2.weight"].cast(torch.bfloat16)
    assert torch.equal(halves.read(), (old[0] / 4 + old[2] * 0.75).bfloat16())


def test_a_merged_mixture_written_for_megatron_comes_back(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = open_model(tiny_folder("qwen3_moe"))
    for method in ("merge", "prune"):
        made = spec(method, 4)
        fewer = upcycled(source, made, measured(made, source, tiny_folder("qwen3_moe")))
        direct = written(fewer, tmp_path / f"{method} direct")
        back = written(open_model(written(fewer, tmp_path / method, "torch_dist")), tmp_path / f"{method} back")
        mine, theirs = weights(direct), weights(back)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
        assert (back / "config.json").read_bytes() == (direct / "config.json").read_bytes()
        assert reference_logits(back, token_ids()).isfinite().all()


def test_clusters_are_experts_that_answer_to_the_same_tokens() -> None:
    generator = torch.Generator().manual_seed(1)
    kinds_TK = torch.randn(200, 3, generator=generator)
    kinds = [2, 0, 1, 0, 2, 2, 0]
    logits_TN = kinds_TK[:, kinds] * torch.rand(7, generator=generator).add(0.5) + 4 * torch.arange(7)
    logits_TN += 0.05 * torch.randn(200, 7, generator=generator)
    assert clusters_of(logits_TN, 3).tolist() == [0, 1, 2, 1, 0, 0, 1]
    assert clusters_of(logits_TN, 7).tolist() == list(range(7))
    assert clusters_of(logits_TN, 1).tolist() == [0] * 7
    assert clusters_of(torch.zeros(5, 4), 2).unique().tolist() == [0, 1]


def test_groups_of_experts_are_merged_within(tiny_folder: TinyFolders) -> None:
    source = open_model(tiny_folder("deepseek_v2"))
    found = measured(spec("merge", 8), source, tiny_folder("deepseek_v2"))
    for measurement in found.values():
        assert measurement.order is not None
        assert [set(part.tolist()) for part in measurement.order.view(4, 4)] == [{0, 1}, {2, 3}, {4, 5}, {6, 7}]


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["prune", "merge"])
@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("mixtral", {"num_experts": 4}, ("num_experts is 4", "fewer")),
        ("mixtral", {"num_experts": 2, "topk": 3}, ("topk", "num_experts")),
        ("mixtral", {"num_experts": 2, "router_noise": 0.1}, ("router_noise is 0.1",)),
        ("mixtral", {"num_experts": 2, "router_groups": True}, ("router_groups is True",)),
        ("deepseek_v2", {"num_experts": 6}, ("num_experts is 6", "4 groups")),
        ("mixtral", {"num_experts": 2}, ("--calibrate",)),
        ("llama", {"num_experts": 2}, ("dense model",)),
    ],
    ids=str,
)
def test_what_cannot_be_made_smaller_is_refused(
    method: str, name: str, values: dict[str, Any], words: tuple[str, ...], tiny_folder: TinyFolders
) -> None:
    with pytest.raises(BadInputError) as refused:
        upcycled(open_model(tiny_folder(name)), UpcycleSpec(**{"method": method, **values}))
    for word in words:
        assert word in str(refused.value)


def test_layers_that_no_text_passes_are_refused_by_name(tiny_folder: TinyFolders) -> None:
    with pytest.raises(NotSupportedError, match="mtp_num_layers 1"):
        upcycled(open_model(tiny_folder("glm4_moe")), spec("prune", 4))


def test_fewer_experts_are_called_inexact(tiny_folder: TinyFolders) -> None:
    unnormalised = open_model(tiny_folder("qwen3_moe_unnormalised")).config
    assert "all weights grow" in check(spec("prune", 4).resolved(), unnormalised).inexact[0]
    assert check(spec("merge", 4).resolved(), unnormalised).inexact
