"""Experts cut by neurons: permuted groups stay exact, a split holds every neuron once and is right on average."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import Model, open_model
from ckptbridge.converters.upcycling.construction import upcycled
from ckptbridge.converters.upcycling.factors import expert_factors
from ckptbridge.converters.upcycling.neurons import DenseMlp
from ckptbridge.converters.upcycling.partition import partition
from ckptbridge.converters.upcycling.semantics import check
from ckptbridge.converters.upcycling.spec import UpcycleSpec
from tests.conftest import TinyFolders
from tests.converters.plain_mixture import Layer, relative, swiglu_TH
from tests.tiny import reference_logits, token_ids

TOLERANCE = 1e-5
"""Of the largest |logit|, in fp32."""
WIDTH = 96

PERMUTED: dict[str, dict[str, Any]] = {
    "E2G4T4": {"num_experts": 8, "topk": 4, "granularity": 4, "permute": True},
    "E3G2T4": {"num_experts": 6, "topk": 4, "granularity": 2, "permute": True},
    "E2G4T4 shared": {"num_experts": 8, "topk": 4, "granularity": 4, "permute": True, "shared": "partition"},
}


def deviation(model: Model, folder: Path, dense: Path) -> float:
    """max |difference| / max |logit| between the written mixture and the dense model, both by transformers."""
    execute(plan_conversion(model, folder, "hf", ConvertOptions(workers=1)))
    expected = reference_logits(dense, token_ids())
    return ((reference_logits(folder, token_ids()) - expected).abs().max() / expected.abs().max()).item()


def dense_mlp(folder: Path, layer: int = 0) -> DenseMlp:
    tensors = open_model(folder).tensors
    stem = f"decoder.layers.{layer}.mlp.linear_fc"
    return DenseMlp(layer, tensors[f"{stem}1.weight"], tensors[f"{stem}2.weight"], WIDTH, True)


@pytest.mark.parametrize("kind", PERMUTED)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_permuted_groups_compute_what_the_dense_model_does(
    name: str, kind: str, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    if name == "qwen3" and "shared" in PERMUTED[kind]:
        name = "qwen2_tied"  # which has a class with a shared expert of its own
    spec = UpcycleSpec(**PERMUTED[kind])
    model = upcycled(open_model(tiny_folder(name)), spec)
    assert check(spec.resolved(), open_model(tiny_folder(name)).config).is_exact
    assert deviation(model, tmp_path / "moe", tiny_folder(name)) <= TOLERANCE


def test_groups_are_cut_in_orders_of_their_own(tiny_folder: TinyFolders) -> None:
    spec = UpcycleSpec(**PERMUTED["E2G4T4"]).resolved()
    sets: set[tuple[int, ...]] = set()
    for layer in range(2):
        for group in partition(spec, layer, WIDTH, None).groups:
            assert sorted(torch.cat([torch.as_tensor(list(shard)) for shard in group]).tolist()) == list(range(WIDTH))
            sets |= {tuple(torch.as_tensor(list(shard)).tolist()) for shard in group}
    assert len(sets) == 2 * 8
    again = partition(spec, 1, WIDTH, None).groups
    assert all(torch.equal(a, b) for a, b in zip(again[1], partition(spec, 1, WIDTH, None).groups[1], strict=True))
    mlp = dense_mlp(tiny_folder("llama"), 1)
    tensors = upcycled(open_model(tiny_folder("llama")), spec).tensors
    neurons, (up, down) = again[1][2], (2.0, 2.0)
    head = "decoder.layers.1.mlp.experts.experts.6"
    fc1, fc2 = mlp.fc1.read(), mlp.fc2.read()
    expected = torch.cat([fc1[:WIDTH][neurons], fc1[WIDTH:][neurons] * up])
    assert torch.equal(tensors[f"{head}.linear_fc1.weight"].read(), expected)
    assert torch.equal(tensors[f"{head}.linear_fc2.weight"].read(), fc2[:, neurons] * down)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_an_order_of_each_experts_own_is_caught(name: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    """Planted: each expert takes its neurons from another order, so that a group holds some twice and others never."""
    dense = open_model(tiny_folder(name))
    spec = UpcycleSpec(**PERMUTED["E2G4T4"]).resolved()
    model = upcycled(dense, spec)
    tensors = dict(model.tensors)
    mlp, factors = dense_mlp(tiny_folder(name)), expert_factors(spec, dense.config)
    for number in range(8):
        order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(number))
        expert = mlp.expert(order[: WIDTH // 4], factors)
        stem = f"decoder.layers.0.mlp.experts.experts.{number}"
        tensors |= {f"{stem}.linear_fc1.weight": expert.fc1, f"{stem}.linear_fc2.weight": expert.fc2}
    assert deviation(replace(model, tensors=tensors), tmp_path / "moe", tiny_folder(name)) > 100 * TOLERANCE


@pytest.mark.parametrize("split", ["contiguous", "random"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_a_split_whose_experts_are_all_met_alike_is_exact(
    name: str, split: Any, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    spec = UpcycleSpec(num_experts=4, topk=4, method="split", split=split, router_std=0.0)
    dense = open_model(tiny_folder(name))
    assert check(spec.resolved(), dense.config).is_exact
    assert deviation(upcycled(dense, spec), tmp_path / "moe", tiny_folder(name)) <= TOLERANCE
    uneven = replace(spec, router_std=0.2)
    assert not check(uneven.resolved(), dense.config).is_exact
    assert deviation(upcycled(dense, uneven), tmp_path / "uneven", tiny_folder(name)) > 100 * TOLERANCE


def _uniform(model: Model, x_TH: Tensor, chosen: tuple[int, ...]) -> Tensor:
    """What a layer gives when every token meets these experts with equal weights."""
    layer = Layer.of(model.tensors, 0)
    shared = 0.0 if layer.shared is None else swiglu_TH(*layer.shared, x_TH)
    return shared + sum(swiglu_TH(*layer.experts[number], x_TH) for number in chosen) / len(chosen)


@pytest.mark.parametrize("shared", ["none", "partition"])
@pytest.mark.parametrize("split", ["contiguous", "random"])
def test_a_split_is_right_on_average_over_what_a_token_may_meet(
    split: Any, shared: Any, tiny_folder: TinyFolders
) -> None:
    """Each expert is scaled by N / T: the mean over all choices of T experts is the dense output, one choice is not."""
    to = "qwen2_moe" if shared == "partition" else None
    width = 24 if shared == "partition" else None
    spec = UpcycleSpec(num_experts=6, topk=2, method="split", split=split, shared=shared, shared_width=width, to=to)
    model = upcycled(open_model(tiny_folder("llama")), spec)
    mlp = dense_mlp(tiny_folder("llama"))
    x_TH = torch.randn(50, 64, generator=torch.Generator().manual_seed(3))
    expected = swiglu_TH(mlp.fc1.read(), mlp.fc2.read(), x_TH)
    if shared == "partition":  # the sigmoid of zeros, which the shared expert stands behind, halves it
        expected = expected + swiglu_TH(*_shared_of(model), x_TH) / 2
    choices = list(combinations(range(6), 2))
    mean = sum(_uniform(model, x_TH, chosen) for chosen in choices) / len(choices)
    assert isinstance(mean, Tensor)
    assert relative(mean, expected) < 1e-6
    assert all(relative(_uniform(model, x_TH, chosen), expected) > 0.3 for chosen in choices)


def _shared_of(model: Model) -> tuple[Tensor, Tensor]:
    found = Layer.of(model.tensors, 0).shared
    assert found is not None
    return found


def test_a_single_group_has_a_single_row(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    """E = 1: the shards of one copy are met with equal weights whatever the router is."""
    spec = UpcycleSpec(num_experts=4, topk=4, granularity=4, router_std=0.3)
    model = upcycled(open_model(tiny_folder("llama")), spec)
    assert len(model.tensors["decoder.layers.0.mlp.router.weight"].read().unique(dim=0)) == 1
    assert deviation(model, tmp_path / "moe", tiny_folder("llama")) <= TOLERANCE


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"method": "split", "split": "clustering"}, ("method split", "--calibrate")),
        ({"method": "cmoe", "to": "qwen2_moe"}, ("method cmoe", "--calibrate")),
        ({"method": "split", "router_init": "fitted"}, ("router_init is fitted", "--calibrate")),
        ({"method": "copy", "router_init": "neurons"}, ("router_init neurons", "method copy", "split and cmoe")),
        ({"method": "split", "num_experts": 7}, ("96 is not a multiple of num_experts 7", "method split")),
        (
            {"method": "split", "num_experts": 7, "shared": "partition"},
            ("96, less 48 of the shared expert, is not a multiple of num_experts 7",),
        ),
    ],
    ids=str,
)
def test_what_cannot_be_cut_is_refused(
    values: dict[str, Any], words: tuple[str, ...], tiny_folder: TinyFolders
) -> None:
    with pytest.raises(BadInputError) as refused:
        upcycled(open_model(tiny_folder("llama")), UpcycleSpec(**{"num_experts": 4, **values}))
    for word in words:
        assert word in str(refused.value)
