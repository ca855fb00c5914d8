"""What is measured of a layer: planted experts are found again, their router too, and the factor is the best one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import Model, open_model
from ckptbridge.converters.tensors import InMemory
from ckptbridge.converters.upcycling.activity import active, sizes
from ckptbridge.converters.upcycling.clustering import balanced_assignment, balanced_clusters
from ckptbridge.converters.upcycling.construction import upcycled
from ckptbridge.converters.upcycling.fitted_routers import SPREAD, fitted_rows, representative_rows
from ckptbridge.converters.upcycling.measured import LayerMeasurement
from ckptbridge.converters.upcycling.measuring import measure_layer, needs_text
from ckptbridge.converters.upcycling.neurons import DenseMlp
from ckptbridge.converters.upcycling.spec import UpcycleSpec
from tests.conftest import TinyFolders
from tests.converters.plain_mixture import Layer, relative, sample_of, swiglu_TH
from tests.tiny import reference_logits, token_ids

HIDDEN, WIDTH = 64, 96
EXPERTS, SHARED, TOKENS = 4, 24, 600


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- clusters of one size -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 10, 1000])
def test_two_clusters_are_filled_at_the_least_cost(n: int) -> None:
    """Of two clusters the optimum is known: the half that loses least by it goes to the first."""
    cost_nk = torch.rand(n, 2, generator=generator()) + torch.tensor([0.0, 0.7])
    found = balanced_assignment(cost_nk)
    assert int(found.sum()) == n // 2
    best = (cost_nk[:, 1] + (cost_nk[:, 0] - cost_nk[:, 1]).sort().values.cumsum(0)[n // 2 - 1] / n).sum()
    assert float(cost_nk.gather(1, found[:, None]).sum()) == pytest.approx(float(best), rel=1e-5)


def test_many_clusters_are_filled_at_nearly_the_least_cost() -> None:
    """No two things would gain by changing places, of costs from 0 to 2; clusters filled in order are far off."""
    cost_nk = torch.rand(240, 8, generator=generator()) + torch.linspace(0, 1, 8)
    found = balanced_assignment(cost_nk)
    assert torch.bincount(found).tolist() == [30] * 8
    total = cost_nk.gather(1, found[:, None]).sum()
    own_n1 = cost_nk.gather(1, found[:, None])
    moved_nn = cost_nk[:, found] - own_n1  # what thing i costs more in the cluster of thing j
    assert float((moved_nn + moved_nn.T).min()) > -1e-3
    in_order = torch.arange(8).repeat_interleave(30)
    assert total < 0.7 * cost_nk.gather(1, in_order[:, None]).sum()


def test_planted_clusters_are_found_and_the_same_seed_gives_the_same() -> None:
    centres_kD = torch.randn(6, 40, generator=generator(1)) * 3
    planted_n = torch.arange(6).repeat(20)[torch.randperm(120, generator=generator(2))]
    points_nD = centres_kD[planted_n] + torch.randn(120, 40, generator=generator(3)) * 0.3
    found = balanced_clusters(points_nD, 6, generator(4))
    planted = {tuple((planted_n == cluster).nonzero()[:, 0].tolist()) for cluster in range(6)}
    assert {tuple(cluster.tolist()) for cluster in found} == planted
    again = balanced_clusters(points_nD, 6, generator(4))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("count", [1, 3, 12])
def test_things_that_are_all_alike_still_make_clusters_of_one_size(count: int) -> None:
    found = balanced_clusters(torch.ones(12, 5), count, generator())
    assert [len(cluster) for cluster in found] == [12 // count] * count
    assert sorted(torch.cat(found).tolist()) == list(range(12))


# ---- a dense MLP that was made of experts ---------------------------------------------------------------------------


class Planted:
    """An MLP of four experts and a shared one, its neurons in a random order, and tokens of four kinds.

    A token of kind e has its e-th coordinate set, which opens the gates of expert e's neurons and closes all others
    but the shared ones'.
    """

    def __init__(self, layer: int = 0) -> None:
        order = torch.randperm(WIDTH, generator=generator(20 + layer))
        width = (WIDTH - SHARED) // EXPERTS
        self.shared = order[:SHARED].sort().values
        self.shards = [order[SHARED + e * width : SHARED + (e + 1) * width].sort().values for e in range(EXPERTS)]
        gate_proj = torch.randn(WIDTH, HIDDEN, generator=generator(30)) * 0.05
        gate_proj[:, :EXPERTS] = -4.0
        gate_proj[self.shared, :EXPERTS] = 4.0
        for number, neurons in enumerate(self.shards):
            gate_proj[neurons, number] = 4.0
        up_proj = torch.randn(WIDTH, HIDDEN, generator=generator(31)) * 0.3
        down_proj = torch.randn(HIDDEN, WIDTH, generator=generator(32)) * 0.1
        down_proj[:, self.shared] *= 1.2
        self.mlp = DenseMlp(layer, InMemory(torch.cat([gate_proj, up_proj])), InMemory(down_proj), WIDTH, True)
        self.x_TH = torch.randn(TOKENS, HIDDEN, generator=generator(33 + layer)) * 0.5
        self.kind_T = torch.arange(TOKENS) % EXPERTS
        self.x_TH[:, :EXPERTS] = torch.nn.functional.one_hot(self.kind_T, EXPERTS).float() * 2
        self.sample = sample_of(self.mlp, self.x_TH)
        self.output_TH = swiglu_TH(self.mlp.fc1.read(), self.mlp.fc2.read(), self.x_TH)


def cmoe(**values: Any) -> UpcycleSpec:
    chosen = {"num_experts": EXPERTS, "topk": 1, "method": "cmoe", "shared_width": SHARED, "allow_inexact": True}
    return UpcycleSpec(**chosen | values)


@pytest.fixture
def config(tiny_folder: TinyFolders) -> Any:
    return open_model(tiny_folder("llama")).config


@pytest.mark.parametrize("values", [{}, {"method": "split", "split": "clustering", "shared": "partition"}], ids=str)
def test_planted_experts_are_found_again(values: dict[str, Any], config: Any) -> None:
    planted = Planted()
    found = measure_layer(cmoe(**values), config, planted.sample, planted.mlp)
    assert found.shared is not None
    assert found.shards is not None
    assert torch.equal(found.shared, planted.shared)
    assert {tuple(s.tolist()) for s in found.shards} == {tuple(s.tolist()) for s in planted.shards}
    again = measure_layer(cmoe(**values), config, planted.sample, planted.mlp)
    assert again.shards is not None
    assert all(torch.equal(a, b) for a, b in zip(found.shards, again.shards, strict=True))


def _layer_output(planted: Planted, spec: UpcycleSpec, found: LayerMeasurement, folder: Any) -> Tensor:
    """The output of a layer of the tensors that `upcycled` makes of the planted MLP and its measurement."""
    dense = open_model(folder)
    head = "decoder.layers.0.mlp.linear_fc"
    tensors = {**dense.tensors, f"{head}1.weight": planted.mlp.fc1, f"{head}2.weight": planted.mlp.fc2}
    model: Model = upcycled(replace(dense, tensors=tensors), replace(spec, layers="0", to="qwen2_moe"), {0: found})
    kind = spec.router
    return Layer.of(model.tensors, 0).output_TH(planted.x_TH, spec.chosen, kind, shared_factor=0.5)


@pytest.mark.parametrize("init", ["fitted", "neurons", None])
@pytest.mark.parametrize("router", ["renormalised", "pre-softmax"])
def test_the_router_finds_the_expert_that_a_token_needs(
    router: Any, init: Any, config: Any, tiny_folder: TinyFolders
) -> None:
    planted = Planted()
    spec = cmoe(router_init=init, router=router)
    found = measure_layer(spec, config, planted.sample, planted.mlp)
    assert found.shards is not None
    assert found.router_rows is not None
    chosen_T = (planted.x_TH @ found.router_rows.T).argmax(1)
    kinds = [next(e for e, s in enumerate(planted.shards) if s.tolist() == shard.tolist()) for shard in found.shards]
    assert (torch.tensor(kinds)[chosen_T] == planted.kind_T).float().mean() > 0.99
    assert relative(_layer_output(planted, spec, found, tiny_folder("llama")), planted.output_TH) < 0.05
    drawn = replace(spec, router_init="random")
    other = measure_layer(drawn, config, planted.sample, planted.mlp)
    assert other.router_rows is None
    assert relative(_layer_output(planted, drawn, other, tiny_folder("llama")), planted.output_TH) > 0.2
    uncalibrated = replace(found, scale=1.0)
    assert relative(_layer_output(planted, spec, uncalibrated, tiny_folder("llama")), planted.output_TH) > 0.2


def test_fitted_rows_are_the_same_from_the_smaller_system() -> None:
    """With fewer tokens than the hidden size the dual system is solved: the same rows as by plain ridge regression."""
    planted = Planted()
    for tokens in (50, 300):
        x_TH = planted.x_TH[:tokens]
        sizes_TF = sizes(planted.sample, planted.mlp)[:tokens]
        found = fitted_rows(sizes_TF, planted.shards, x_TH, 0.02)
        wanted_TN = torch.stack([sizes_TF[:, s].double().square().sum(1).sqrt().log() for s in planted.shards], 1)
        x = x_TH.double()
        ridge = 0.01 * (x.T @ x).diagonal().mean() * torch.eye(HIDDEN, dtype=torch.float64)
        rows_NH = torch.linalg.lstsq(x.T @ x + ridge, x.T @ wanted_TN).solution.T
        rows_NH -= rows_NH.mean(0)
        torch.testing.assert_close(
            found, (rows_NH * 0.02 / rows_NH.square().mean().sqrt()).float(), rtol=1e-4, atol=1e-6
        )


def test_a_representative_neuron_is_active_as_its_expert_is_on_the_mean() -> None:
    planted = Planted()
    sizes_TF = sizes(planted.sample, planted.mlp)
    activity_FT = active(sizes_TF).float().T
    gate_proj = planted.mlp.fc1.read()[:WIDTH]
    expected: list[Tensor] = []
    for shard in planted.shards:
        alike = torch.nn.functional.cosine_similarity(activity_FT[shard], activity_FT[shard].mean(0), dim=1)
        assert alike.sort().values.diff()[-1] > 1e-4  # one neuron alone is the most alike
        expected.append(gate_proj[shard[alike.argmax()]])
    rows_NH = torch.stack(expected)
    found = representative_rows(sizes_TF, planted.shards, planted.mlp, planted.x_TH, 0.02)
    torch.testing.assert_close(found, rows_NH * 0.02 / rows_NH.square().mean().sqrt())
    spread = representative_rows(sizes_TF, planted.shards, planted.mlp, planted.x_TH, None)
    logits_TN = planted.x_TH @ spread.T
    assert (logits_TN - logits_TN.mean(1, keepdim=True)).square().mean().sqrt().item() == pytest.approx(SPREAD)


def test_a_neuron_counts_by_what_it_adds() -> None:
    """up_proj times 8 and down_proj through 8 is the same MLP: its neurons are as active as they were."""
    planted = Planted()
    factor_F = torch.where(torch.arange(WIDTH) % 3 == 0, 8.0, 1.0)
    fc1 = planted.mlp.fc1.read() * torch.cat([torch.ones(WIDTH), factor_F])[:, None]
    other = replace(planted.mlp, fc1=InMemory(fc1), fc2=InMemory(planted.mlp.fc2.read() / factor_F))
    expected = active(sizes(planted.sample, planted.mlp))
    assert torch.equal(active(sizes(sample_of(other, planted.x_TH), other)), expected)
    assert expected.sum(1).unique().tolist() == [round(WIDTH * 0.1)]


# ---- the factor -----------------------------------------------------------------------------------------------------

UNNORMALISED: dict[str, dict[str, Any]] = {
    "E8T1": {"num_experts": 8, "topk": 1},
    "E8T2": {"num_experts": 8, "topk": 2},
    "E4G4T4": {"num_experts": 16, "topk": 4, "granularity": 4},
    "E4G4T8 permuted": {"num_experts": 16, "topk": 8, "granularity": 4, "permute": True},
    "E4T2 overlap": {"num_experts": 4, "topk": 2, "shared": "overlap", "shared_weight": 0.25},
    "E4G2T2 partition": {"num_experts": 8, "topk": 2, "granularity": 2, "shared": "partition", "shared_width": 32},
    "E4G2T2 down": {"num_experts": 8, "topk": 2, "granularity": 2, "scaling": "down"},
}


@pytest.mark.parametrize("kind", UNNORMALISED)
def test_calibrated_softmax_weights_have_no_gain(kind: str, config: Any, tiny_folder: TinyFolders) -> None:
    planted = Planted()
    spec = UpcycleSpec(**UNNORMALISED[kind], router="pre-softmax", router_std=0.2, seed=2)
    found = measure_layer(spec, config, planted.sample, planted.mlp)
    assert found.scale < 0.9

    def gain_and_error(measured: LayerMeasurement) -> tuple[float, float]:
        made = _layer_output(planted, spec, measured, tiny_folder("llama"))
        wanted, routed = planted.output_TH, made
        if spec.shared != "none":  # what is fitted is what the routed experts add
            always = _layer_output(planted, spec, replace(measured, scale=0.0), tiny_folder("llama"))
            wanted, routed = wanted - always, made - always
        size_T1 = wanted.square().sum(1, keepdim=True)
        best = (routed * wanted / size_T1).sum() / (routed.square() / size_T1).sum()
        return float(best), float(((routed - wanted).square() / size_T1).mean())

    best, error = gain_and_error(found)
    assert best == pytest.approx(1, abs=1e-4)
    plain, worse = gain_and_error(replace(found, scale=1.0))
    assert plain == pytest.approx(found.scale, rel=1e-4)
    assert error < worse


def test_weights_that_sum_to_one_need_no_factor(config: Any) -> None:
    planted = Planted()
    for values in ({}, {"granularity": 2}, {"method": "drop"}, {"router": "sigmoid"}):
        spec = UpcycleSpec(**{"num_experts": 8, "topk": 2, "router_std": 0.2} | values)
        assert measure_layer(spec, config, planted.sample, planted.mlp) == LayerMeasurement()
    left_out = UpcycleSpec(num_experts=8, topk=2, router="pre-softmax", router_std=0.2, scaling="none")
    assert measure_layer(left_out, config, planted.sample, planted.mlp).scale == 1


@pytest.mark.parametrize("split", ["contiguous", "random", "clustering"])
def test_a_split_of_which_every_expert_is_met_keeps_its_factor(
    split: Any, config: Any, tiny_folder: TinyFolders
) -> None:
    planted = Planted()
    spec = UpcycleSpec(num_experts=4, topk=4, method="split", split=split, router_std=0.0)
    found = measure_layer(spec, config, planted.sample, planted.mlp)
    assert found.scale == pytest.approx(1, abs=1e-6)
    assert relative(_layer_output(planted, spec, found, tiny_folder("llama")), planted.output_TH) < 1e-6


def test_prompts_rows_are_kept_and_calibrated(config: Any) -> None:
    planted = Planted()
    rows = torch.randn(8, HIDDEN, generator=generator()) * 0.2
    spec = UpcycleSpec(num_experts=8, topk=2, router="pre-softmax", router_init="hidden-state")
    found = measure_layer(spec, config, planted.sample, planted.mlp, rows)
    assert found.router_rows is rows
    assert found.scale < 0.9


WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "split clustering": ("llama", {"method": "split", "split": "clustering"}),
    "split clustering, qwen3": ("qwen3", {"method": "split", "split": "clustering"}),
    "split clustering, shared": ("qwen2", {"method": "split", "split": "clustering", "shared": "partition"}),
    "cmoe": ("llama", {"method": "cmoe", "shared_width": 32}),
    "cmoe, sigmoid": ("qwen3", {"method": "cmoe", "router": "sigmoid", "to": "glm4_moe", "shared_width": 32}),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_carved_model_of_which_nothing_is_left_out_computes_what_the_dense_one_does(
    kind: str, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    """Every expert met, with equal weights: no neuron is lost, doubled or put beside another's column."""
    name, values = WHOLE[kind]
    dense = open_model(tiny_folder(name))
    spec = UpcycleSpec(num_experts=4, topk=4, router_init="random", router_std=0.0, **values)
    measured: dict[int, LayerMeasurement] = {}
    for layer in range(4):
        fc1, fc2 = (dense.tensors[f"decoder.layers.{layer}.mlp.linear_fc{part}.weight"] for part in (1, 2))
        mlp = DenseMlp(layer, fc1, fc2, WIDTH, True)
        sample = sample_of(mlp, torch.randn(200, HIDDEN, generator=generator(layer)))
        measured[layer] = measure_layer(spec, dense.config, sample, mlp)
    shards = measured[0].shards
    assert shards is not None
    assert not torch.equal(torch.cat(shards), torch.cat(shards).sort().values)
    execute(plan_conversion(upcycled(dense, spec, measured), tmp_path / "moe", "hf", ConvertOptions(workers=1)))
    expected = reference_logits(tiny_folder(name), token_ids())
    difference = (reference_logits(tmp_path / "moe", token_ids()) - expected).abs().max() / expected.abs().max()
    assert difference.item() <= 1e-5


@pytest.mark.parametrize(
    ("values", "needs"),
    [
        ({}, False),
        ({"granularity": 2, "router": "pre-softmax"}, False),
        ({"method": "split"}, False),
        ({"method": "split", "split": "random"}, False),
        ({"method": "split", "split": "clustering"}, True),
        ({"method": "split", "router_init": "fitted"}, True),
        ({"method": "split", "router_init": "neurons"}, True),
        ({"method": "cmoe"}, True),
        ({"router_init": "hidden-state"}, False),
        ({"method": "prune"}, False),
    ],
    ids=str,
)
def test_which_methods_need_a_text(values: dict[str, Any], needs: bool) -> None:
    assert needs_text(UpcycleSpec(**{"num_experts": 4, **values})) is needs
