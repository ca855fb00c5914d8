"""The report of an upcycle: what is exact shows as such, and planted faults show in their layer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.model import Model, decoder_tensors, open_model
from ckptbridge.converters.tensors import InMemory, LazyTensor, Zeros, scaled
from ckptbridge.converters.upcycling.construction import upcycled
from ckptbridge.converters.upcycling.measured import LayerMeasurement
from ckptbridge.converters.upcycling.spec import DENSE_METHODS, UpcycleSpec
from ckptbridge.trainer.decoder import Decoder
from ckptbridge.trainer.loading import empty_decoder, load_weights
from ckptbridge.trainer.upcycling.flops import flops_a_token
from ckptbridge.trainer.upcycling.logit_differences import LogitComparison
from ckptbridge.trainer.upcycling.report import PROBE_TOKENS, UpcycleReport, report
from ckptbridge.trainer.upcycling.report_lines import lines
from ckptbridge.trainer.upcycling.settings import recommended_settings
from tests.conftest import TinyFolders
from tests.tiny import NUM_LAYERS, save_tiny, token_ids

EXACT: dict[str, dict[str, Any]] = {
    "E4T2": {"num_experts": 4},
    "E2G4T4": {"num_experts": 8, "topk": 4, "granularity": 4},
    "shared partition": {"num_experts": 8, "topk": 4, "granularity": 2, "shared": "partition"},
    "sigmoid in groups": {"num_experts": 8, "topk": 2, "granularity": 2, "router": "sigmoid", "router_groups": True},
    "some layers": {"num_experts": 4, "granularity": 2, "layers": "1::2", "to": "qwen2_moe"},
}
Plant = Callable[[Model], dict[str, LazyTensor]]
IDS = list(token_ids())
TOKENS = token_ids().numel()


def reported(dense: Model, tensors: dict[str, LazyTensor] | None = None, **values: Any) -> UpcycleReport:
    spec = UpcycleSpec(**{"num_experts": 4, "granularity": 2, "seed": 3, **values})
    moe = upcycled(dense, spec)
    return report(dense, replace(moe, tensors={**moe.tensors, **(tensors or {})}), spec, IDS)


def test_rounding_that_grew_over_the_layers_is_no_defect(tiny_folder: TinyFolders) -> None:
    """A model that amplifies: its logits may differ by more, as long as no layer does by itself."""
    found = reported(open_model(tiny_folder("llama")))

    def changed(logits: float, layer: int = 0, **differences: float) -> UpcycleReport:
        layers = [*found.layers]
        layers[layer] = replace(layers[layer], **differences)
        return replace(found, layers=tuple(layers), logits=(replace(found.logits[0], max_relative_difference=logits),))

    grown = changed(5e-5)
    assert grown.passed
    assert grown.is_grown_rounding
    assert grown.first_defect is None
    assert "rounding grows over 4 layers" in lines(grown)[0]
    assert not changed(2e-3).passed
    assert not changed(5e-5, layer=2, output_difference=2e-5).passed
    assert not changed(5e-5, layer=2, output_difference=math.nan).passed
    assert not changed(5e-5, hidden_difference=2e-5).passed
    assert changed(5e-5, layer=2, hidden_difference=2e-5).passed
    assert not found.is_grown_rounding


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_what_is_exact_passes(name: str, kind: str, tiny_folder: TinyFolders) -> None:
    dense = open_model(tiny_folder(name))
    found = reported(dense, **{"granularity": 1, **EXACT[kind]})
    spec = UpcycleSpec(**{"granularity": 1, **EXACT[kind]}).resolved()
    assert found.passed
    assert found.is_exact
    assert found.inexact == ()
    assert found.tolerance == 1e-5
    assert found.first_defect is None
    (logits,) = found.logits
    assert logits.max_relative_difference < 1e-5
    assert abs(logits.loss_difference) < 1e-5
    assert abs(logits.kl) < 1e-9
    assert [layer.layer for layer in found.layers] == list(range(NUM_LAYERS))
    for layer in found.layers:
        assert layer.hidden_difference < 1e-5
        assert layer.output_difference < 1e-5
        if kind == "some layers" and layer.layer % 2 == 0:
            assert (layer.load, layer.busiest) == ((), None)
            continue
        assert len(layer.load) == spec.num_experts
        assert sum(layer.load) == TOKENS * spec.chosen
        assert layer.busiest == max(layer.load) / (sum(layer.load) / len(layer.load))
        for group in range(spec.groups):  # what belongs together is met together
            assert len({*layer.load[group * spec.granularity : (group + 1) * spec.granularity]}) == 1


@pytest.mark.parametrize("name", ["mistral", "qwen3", "granite", "nemotron"])
def test_other_families_pass_too(name: str, tiny_folder: TinyFolders) -> None:
    found = reported(open_model(tiny_folder(name)))
    assert found.is_exact
    assert found.logits[0].max_relative_difference < 1e-5
    assert all(layer.output_difference < 1e-5 for layer in found.layers)


def scaled_expert(moe: Model) -> dict[str, LazyTensor]:
    name = "decoder.layers.2.mlp.experts.experts.2.linear_fc2.weight"
    return {name: scaled(moe.tensors[name], 1.01)}


def ungrouped_rows(moe: Model) -> dict[str, LazyTensor]:
    name = "decoder.layers.2.mlp.router.weight"
    return {name: InMemory(torch.randn(moe.tensors[name].shape, generator=torch.Generator().manual_seed(1)) * 0.02)}


def published_scaling(moe: Model) -> dict[str, LazyTensor]:
    """Of one layer: the cube root of G on gate_proj too."""
    made: dict[str, LazyTensor] = {}
    for name, tensor in moe.tensors.items():
        if name.startswith("decoder.layers.2.mlp.experts."):
            weight, root = tensor.read(), 2 ** (1 / 3)
            if "linear_fc1" in name:
                half = len(weight) // 2
                made[name] = InMemory(torch.cat([weight[:half] * root, weight[half:] * root]))
            else:
                made[name] = InMemory(weight / 2 * root)
    return made


def test_the_whole_published_scaling_is_told_before_it_is_measured(tiny_folder: TinyFolders) -> None:
    found = reported(open_model(tiny_folder("llama")), scaling="paper")
    assert not found.is_exact
    assert found.passed  # it is what was asked for
    assert any("SwiGLU" in reason for reason in found.inexact)
    assert all(layer.output_difference > 0.03 for layer in found.layers)


@pytest.mark.parametrize("plant", [scaled_expert, ungrouped_rows, published_scaling])
def test_a_planted_fault_shows_in_its_layer(plant: Plant, tiny_folder: TinyFolders) -> None:
    dense = open_model(tiny_folder("llama"))
    moe = upcycled(dense, UpcycleSpec(num_experts=4, granularity=2, seed=3))
    found = reported(dense, plant(moe))
    assert found.is_exact
    assert not found.passed
    assert found.first_defect == 2
    off = [layer.layer for layer in found.layers if layer.output_difference > 1e-5]
    assert off == [2]
    assert [layer.layer for layer in found.layers if layer.hidden_difference > 1e-5] == [2, 3]
    told = lines(found)
    assert told[0].startswith("DEFECT: virtual-group should be exact, but logits differ by")
    assert told[1].startswith("  layer 2 differs most by itself")
    assert found.to_json()["passed"] is False


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"granularity": 1, "router": "pre-softmax"}, "not divided by their sum"),
        ({"granularity": 1, "noise": 0.1}, "noise of 0.1"),
        ({"scaling": "none"}, "not scaled"),
        ({"method": "drop", "granularity": 1}, "50%"),
        ({"topk": 3, "allow_inexact": True}, "topk 3 is not a multiple of granularity 2"),
        ({"method": "split", "granularity": 1}, "2 of the 4 experts"),
    ],
    ids=str,
)
def test_what_is_not_exact_says_why(values: dict[str, Any], reason: str, tiny_folder: TinyFolders) -> None:
    found = reported(open_model(tiny_folder("llama")), **values)
    assert not found.is_exact
    assert any(reason in told for told in found.inexact)
    assert found.passed
    assert found.logits[0].max_relative_difference > 1e-3
    assert found.logits[0].kl > 1e-6
    assert any(reason in line for line in lines(found))


def test_numbers_that_are_not_finite_do_not_pass(tiny_folder: TinyFolders) -> None:
    dense = open_model(tiny_folder("llama"))
    name = "decoder.layers.2.mlp.experts.experts.0.linear_fc2.weight"
    for values in ({}, {"scaling": "none"}):
        shape = upcycled(dense, UpcycleSpec(num_experts=4, granularity=2)).tensors[name].shape
        found = reported(dense, {name: InMemory(torch.full(shape, math.nan))}, **values)
        assert not found.passed
        told = found.to_json()
        assert json.loads(json.dumps(told, allow_nan=False))["logits"][0]["kl"] is None
        assert lines(found)
    assert found.first_defect is None


def test_factors_that_are_no_powers_of_two_cost_bits_in_half_precision(tmp_path: Any) -> None:
    half = open_model(save_tiny("llama", tmp_path / "half", torch.bfloat16))
    assert reported(half).tolerance == 1e-5
    third = reported(half, num_experts=6, topk=3, granularity=3)
    assert third.tolerance == 1e-2
    assert third.passed
    assert 1e-5 < third.logits[0].max_relative_difference < 1e-2
    assert "multiplied by a factor, and rounded once more" in lines(third)[0]


# ---- sources of other kinds -----------------------------------------------------------------------------------------


def test_several_sources_are_compared_one_by_one(tiny_folder: TinyFolders) -> None:
    one = open_model(tiny_folder("llama"))
    tensors = {
        name: scaled(tensor, 1.3) if ".mlp.linear_fc2" in name else tensor for name, tensor in one.tensors.items()
    }
    other = replace(one, tensors=tensors)
    spec = UpcycleSpec(num_experts=2, method="branch-train-mix")
    found = report([one, other], upcycled(one, spec, others=[other]), spec, IDS)
    assert found.passed
    assert not found.is_exact
    assert len(found.logits) == len(found.sources) == 2
    for source, logits in zip((one, other), found.logits, strict=True):
        assert logits.loss_source == pytest.approx(losses(whole_logits(source), IDS), abs=1e-6)
        assert logits.max_relative_difference > 1e-3
    assert found.logits[0].loss_mixture == found.logits[1].loss_mixture
    assert sum("against" in line for line in lines(found)) == 2


def test_a_mixture_is_compared_with_its_source_mixture(tiny_folder: TinyFolders) -> None:
    source = open_model(tiny_folder("mixtral"))
    more = UpcycleSpec(num_experts=8, method="expert-upcycling")
    found = report(source, upcycled(source, more), more, IDS)
    assert found.passed
    assert found.is_exact
    assert all(layer.output_difference < 1e-5 and len(layer.load) == 8 for layer in found.layers)
    fewer = UpcycleSpec(num_experts=3, method="prune")
    measured = {layer: LayerMeasurement(order=torch.tensor([0, 1, 3])) for layer in range(NUM_LAYERS)}
    pruned = report(source, upcycled(source, fewer, measured), fewer, IDS)
    assert not pruned.is_exact
    assert pruned.inexact
    assert pruned.logits[0].max_relative_difference > 1e-3
    assert pruned.cost_mixture.parameters < pruned.cost_source.parameters


def test_models_of_other_sizes_are_refused(tiny_folder: TinyFolders) -> None:
    dense = open_model(tiny_folder("llama"))
    spec = UpcycleSpec(num_experts=4)
    moe = upcycled(dense, spec)
    with pytest.raises(BadInputError, match="vocab_size is 250, but 99"):
        report(replace(dense, config=replace(dense.config, vocab_size=99)), moe, spec, IDS)


# ---- figures --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def whole_logits(model: Model) -> Tensor:
    """Logits of all sequences by the decoder that holds the model whole."""
    decoder = empty_decoder(model.config, "reference", torch.float32, torch.device("cpu"))
    load_weights(decoder, decoder_tensors(model.tensors, model.config))
    return torch.cat([decoder.logits(decoder(ids_S[None]).hidden_BSH[0]) for ids_S in IDS])


def losses(logits_TV: Tensor, sequences: list[Tensor]) -> float:
    parts = logits_TV.double().split([len(ids_S) for ids_S in sequences])
    targets = torch.cat([ids_S[1:] for ids_S in sequences])
    return F.cross_entropy(torch.cat([part[:-1] for part in parts]), targets).item()


@pytest.mark.parametrize("block", [1, 7, 100, 250])
def test_logits_are_compared_as_if_they_lay_side_by_side(block: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(TOKENS, 250, generator=generator) * 5 for _ in range(2))
    targets = torch.cat([torch.cat([ids_S[1:], torch.tensor([-1])]) for ids_S in IDS])
    comparison = LogitComparison(targets)
    for first in range(0, 250, block):
        comparison.add(first, a[:, first : first + block], b[:, first : first + block])
    found = comparison.result()
    log_a, log_b = a.double().log_softmax(1), b.double().log_softmax(1)
    assert found.loss_source == pytest.approx(losses(a, IDS), abs=1e-12)
    assert found.loss_mixture == pytest.approx(losses(b, IDS), abs=1e-12)
    assert found.kl == pytest.approx((log_a.exp() * (log_a - log_b)).sum(1).mean().item(), abs=1e-11)
    assert found.max_abs_difference == (a.double() - b.double()).abs().max().item()
    assert found.max_relative_difference == found.max_abs_difference / a.abs().max().item()
    assert found.argmax_agreement == (a.argmax(1) == b.argmax(1)).double().mean().item()


def test_the_reports_logits_are_the_models(tiny_folder: TinyFolders) -> None:
    dense, spec = open_model(tiny_folder("llama")), UpcycleSpec(num_experts=4, router="pre-softmax")
    moe = upcycled(dense, spec)
    a, b = whole_logits(dense), whole_logits(moe)
    (found,) = report(dense, moe, spec, IDS).logits
    assert found.loss_source == pytest.approx(losses(a, IDS), abs=1e-6)
    assert found.loss_mixture == pytest.approx(losses(b, IDS), abs=1e-6)
    assert found.max_abs_difference == pytest.approx((a - b).abs().max().item(), rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen2_moe_sparse", "gemma2", "nemotron", "deepseek_v2"])
def test_flops_are_those_that_torch_counts(name: str, tiny_folder: TinyFolders) -> None:
    model, ids = open_model(tiny_folder(name)), token_ids(1)
    decoder = empty_decoder(model.config, "reference", torch.float32, torch.device("cpu"))
    load_weights(decoder, decoder_tensors(model.tensors, model.config))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        decoder.logits(decoder(ids).hidden_BSH)
    counted = counter.get_total_flops()
    # The reference multiplies every query with every key and masks afterwards, windows too.
    context = ids.numel()
    expected = flops_a_token(replace(model, config=replace(model.config, window_size=None)), context) * ids.numel()
    assert counted == pytest.approx(expected, rel=1e-9)


def test_flops_of_llama_3_are_the_published_ones(tiny_folder: TinyFolders) -> None:
    """arXiv 2412.09952: 4.7e14 dense and 7.5e14 with 8 experts, top-2, of a sequence's forward and backward pass."""
    tiny = open_model(tiny_folder("llama"))
    sizes = {"num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336, "vocab_size": 128256}
    heads = {"num_attention_heads": 32, "num_query_groups": 8, "kv_channels": 128}
    config = replace(tiny.config, **sizes, **heads)
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in Decoder(config).named_parameters()}
    dense = replace(tiny, config=config, tensors={n: Zeros(shape, torch.bfloat16) for n, shape in shapes.items()})
    moe = upcycled(dense, UpcycleSpec(num_experts=8))
    assert 3 * 8192 * flops_a_token(dense, 8192) == pytest.approx(4.7e14, rel=0.01)
    assert 3 * 8192 * flops_a_token(moe, 8192) == pytest.approx(7.5e14, rel=0.01)


def test_costs_and_text_are_told(tiny_folder: TinyFolders) -> None:
    dense, spec = open_model(tiny_folder("llama")), UpcycleSpec(num_experts=4)
    done: list[tuple[int, int]] = []
    found = report(dense, upcycled(dense, spec), spec, on_progress=lambda *at: done.append(at))
    assert (found.tokens, found.text) == (PROBE_TOKENS, "token ids drawn with seed 0")
    assert done == [(number + 1, NUM_LAYERS) for number in range(NUM_LAYERS)]
    mlp = 3 * 64 * 96 * NUM_LAYERS
    router = 4 * 64 * NUM_LAYERS
    assert found.cost_mixture.parameters - found.cost_source.parameters == 3 * mlp + router
    assert found.cost_mixture.active_parameters - found.cost_source.active_parameters == mlp + router
    assert found.cost_mixture.flops_a_token - found.cost_source.flops_a_token == 2 * (mlp + router)
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert told["passed"] is True
    assert told["layers"][0]["busiest"] == found.layers[0].busiest
    assert told["logits"][0]["loss_difference"] == found.logits[0].loss_difference
    assert told["settings"][0].keys() == {"name", "value", "source"}
    shown = lines(found)
    assert shown[0].startswith("copy is exact")
    assert sum(line.startswith(("0 ", "1 ", "2 ", "3 ")) for line in shown) == NUM_LAYERS
    many = replace(
        found,
        layers=tuple(replace(found.layers[0], layer=n, output_difference=1 / (1 + abs(n - 50))) for n in range(100)),
    )
    shown = lines(many)
    assert any(line.startswith("50 ") for line in shown)
    assert any("16 of 100 layers" in line for line in shown)
    idle = replace(found, layers=(replace(found.layers[0], load=(5, 0, 7, 0)), *found.layers[1:]))
    assert any("2 of 16 experts met no token" in line for line in lines(idle))


def test_every_recommendation_names_its_source() -> None:
    for method in (*DENSE_METHODS, "expert-upcycling"):
        settings = recommended_settings(UpcycleSpec(num_experts=4, method=method).resolved())
        assert settings
        assert all("arXiv 2" in setting.source and setting.value for setting in settings)
    for method in ("prune", "merge"):
        assert recommended_settings(UpcycleSpec(num_experts=4, method=method).resolved()) == ()
