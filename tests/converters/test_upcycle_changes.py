"""Drop-Upcycling and noise: statistics and masks against plain torch, bits, and the same numbers in any reading."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import open_model
from ckptbridge.converters.tensors import InMemory, LazyTensor
from ckptbridge.converters.upcycling.changes import BLOCK_ROWS, Changes
from ckptbridge.converters.upcycling.construction import upcycled
from ckptbridge.converters.upcycling.drawn import generator_for
from ckptbridge.converters.upcycling.factors import Factors
from ckptbridge.converters.upcycling.neurons import DenseMlp, Expert, Neurons
from ckptbridge.converters.upcycling.spec import UpcycleSpec
from tests.conftest import TinyFolders
from tests.converters.plain_mixture import Layer, random_mlp, relative, swiglu_TH

MASKS = ("shared", "per-matrix")


def drop_spec(ratio: float = 0.5, **values: Any) -> UpcycleSpec:
    return UpcycleSpec(**{"num_experts": 8, "method": "drop", "drop_ratio": ratio, "seed": 4, **values}).resolved()


def experts(
    spec: UpcycleSpec, mlp: DenseMlp, neurons: Neurons | None = None, factors: Factors | None = None
) -> list[Expert]:
    """All experts of an MLP, each of these neurons, as a spec changes them."""
    neurons = range(mlp.width) if neurons is None else neurons
    factors = factors or Factors()
    changes = Changes(spec, mlp, factors)
    return [changes.of(mlp.expert(neurons, factors), number, neurons) for number in range(spec.num_experts)]


def matrices(expert: Expert) -> dict[str, Tensor]:
    """Each matrix with its neurons in rows."""
    gate_proj, up_proj = expert.fc1.read().chunk(2)
    return {"gate": gate_proj, "up": up_proj, "down": expert.fc2.read().T}


def dense(mlp: DenseMlp) -> dict[str, Tensor]:
    return matrices(Expert(mlp.fc1, mlp.fc2))


def new_neurons(mine: Tensor, old: Tensor) -> Tensor:
    """Numbers of the rows that differ; of a row either everything is new or nothing."""
    differs = mine != old
    assert bool((differs.all(1) | ~differs.any(1)).all())
    return differs.all(1).nonzero()[:, 0]


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("mask", MASKS)
def test_the_masks_are_the_papers_or_its_codes(mask: str, ratio: float) -> None:
    mlp = random_mlp()
    sets: list[tuple[int, ...]] = []
    for expert in experts(drop_spec(ratio, drop_mask=mask), mlp):
        found = [new_neurons(mine, dense(mlp)[name]) for name, mine in matrices(expert).items()]
        assert {len(numbers) for numbers in found} == {round(192 * ratio)}
        sets += {tuple(numbers.tolist()) for numbers in found}
    assert len(sets) == len(set(sets)) == (8 if mask == "shared" else 24)  # and no two experts drop the same


@pytest.mark.parametrize("mask", MASKS)
def test_what_is_drawn_has_the_mean_and_spread_of_what_is_dropped(mask: str) -> None:
    """Against plain torch, with a matrix whose neurons differ in mean and spread; then the drawn numbers themselves."""
    base = random_mlp(hidden=256, width=200)
    spread = torch.linspace(0.2, 3, 200)
    fc1 = base.fc1.read() * spread.repeat(2)[:, None] + torch.linspace(-0.2, 0.4, 400)[:, None]
    mlp = replace(base, fc1=InMemory(fc1), fc2=InMemory(base.fc2.read() * spread - 0.1))
    for number, expert in enumerate(experts(drop_spec(0.3, drop_mask=mask), mlp)):
        for name, mine in matrices(expert).items():
            old = dense(mlp)[name]
            numbers = new_neurons(mine, old)
            mean, std = old[numbers].mean(), old[numbers].std()
            drawn = mine[numbers]
            count = drawn.numel()
            assert abs(drawn.mean() - mean) < 5 * std / count**0.5
            assert abs(drawn.std() / std - 1) < 5 / (2 * count) ** 0.5
            if name == "gate":
                generator = generator_for(4, "drawn anew", 0, number, "gate", 0)
                first = numbers[numbers < BLOCK_ROWS]
                expected = torch.randn(len(first), 256, generator=generator) * std + mean
                torch.testing.assert_close(mine[first], expected, rtol=1e-5, atol=1e-6)


def test_none_dropped_is_the_identity_and_all_dropped_is_new() -> None:
    mlp = random_mlp()
    for expert in experts(drop_spec(0.0), mlp):
        assert expert.fc1.extents() == mlp.fc1.extents()
        assert torch.equal(expert.fc1.read(), mlp.fc1.read())
        assert torch.equal(expert.fc2.read(), mlp.fc2.read())
    for mask in MASKS:
        for expert in experts(drop_spec(1.0, drop_mask=mask), mlp):
            assert not (expert.fc1.read() == mlp.fc1.read()).any()
            assert not (expert.fc2.read() == mlp.fc2.read()).any()


@pytest.mark.parametrize("values", [{}, {"drop_mask": "per-matrix"}, {"noise": 0.1}, {"noise": 0.1, "method": "copy"}])
def test_numbers_do_not_depend_on_how_they_are_read(values: dict[str, Any]) -> None:
    mlp = random_mlp(width=BLOCK_ROWS * 3 + 7)
    whole = experts(drop_spec(**values), mlp)
    wanted = [(expert.fc1.read(), expert.fc2.read()) for expert in whole]
    pieces = experts(drop_spec(**values), mlp)
    for (fc1, fc2), expert in reversed(list(zip(wanted, pieces, strict=True))):
        for tensor, lazy in ((fc2, expert.fc2), (fc1, expert.fc1)):
            for step in (1, 5, BLOCK_ROWS, BLOCK_ROWS + 9):
                parts = [lazy.read_rows(at, min(at + step, len(tensor))) for at in range(0, len(tensor), step)]
                assert torch.equal(torch.cat(parts), tensor)
            assert lazy.read_rows(3, 3).shape == (0, *tensor.shape[1:])
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda expert: expert.fc1.read(), experts(drop_spec(**values), mlp)))
    assert all(torch.equal(mine, fc1) for mine, (fc1, _) in zip(again, wanted, strict=True))
    other = experts(drop_spec(**{"seed": 5, **values}), mlp)
    assert not any(torch.equal(expert.fc1.read(), fc1) for expert, (fc1, _) in zip(other, wanted, strict=True))


class Counted(LazyTensor):
    """Counts how many of its rows are read."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.shape, self.dtype, self.count = tensor, tuple(tensor.shape), tensor.dtype, 0

    def read_rows(self, start: int, stop: int) -> Tensor:
        self.count += stop - start
        return self.tensor[start:stop].clone()


def test_statistics_take_one_pass_over_the_source_and_none_before_it_is_needed() -> None:
    plain = random_mlp()
    fc1, fc2 = Counted(plain.fc1.read()), Counted(plain.fc2.read())
    made = experts(drop_spec(noise=0.1), replace(plain, fc1=fc1, fc2=fc2))
    assert (fc1.count, fc2.count) == (0, 0)
    for expert in made:
        expert.fc1.read()
        expert.fc2.read()
    assert (fc1.count, fc2.count) == (9 * 2 * 192, 9 * 64)


@pytest.mark.parametrize("method", ["drop", "copy"])
def test_bf16_is_rounded_once_and_what_is_kept_stays(method: str) -> None:
    """The fp32 model whose weights are bf16 numbers gives the same, rounded afterwards."""
    narrow = random_mlp(dtype=torch.bfloat16)
    wide = replace(narrow, fc1=InMemory(narrow.fc1.read().float()), fc2=InMemory(narrow.fc2.read().float()))
    spec = drop_spec(method=method, noise=0.0 if method == "drop" else 0.05)
    for small, large in zip(experts(spec, narrow), experts(spec, wide), strict=True):
        assert small.fc1.dtype == torch.bfloat16
        assert torch.equal(small.fc1.read(), large.fc1.read().bfloat16())
        assert torch.equal(small.fc2.read(), large.fc2.read().bfloat16())
        if method == "drop":
            kept = (small.fc1.read() == narrow.fc1.read()).all(1)
            assert 0.49 < kept.float().mean() < 0.51


def test_noise_is_a_share_of_each_matrixs_root_mean_square() -> None:
    base = random_mlp(hidden=256, width=200)
    mlp = replace(base, fc2=InMemory(base.fc2.read() * 7))
    spec = drop_spec(method="copy", noise=0.25)
    differences: list[Tensor] = []
    for expert in experts(spec, mlp):
        for name, mine in matrices(expert).items():
            old = dense(mlp)[name]
            noise = mine - old
            assert (noise.std() / old.square().mean().sqrt()).item() == pytest.approx(0.25, rel=0.02)
            assert abs(noise.mean() / noise.std()) < 0.02
            differences.append(noise.flatten() / noise.norm())
    products = torch.stack(differences) @ torch.stack(differences).T
    assert products.fill_diagonal_(0).abs().max() < 0.025  # each expert's and each matrix's noise is its own


def test_a_factor_multiplies_what_is_drawn_too() -> None:
    """Drawn from scaled weights: the neurons of a permuted half, up_proj times 2, down_proj times 4."""
    mlp = random_mlp()
    half = torch.randperm(192, generator=torch.Generator().manual_seed(0))[:96]
    factors = Factors(up=2.0, down=4.0)
    spec = drop_spec(0.5, noise=0.1)
    small = replace(mlp, fc1=InMemory(mlp.fc1.read()[torch.cat([half, half + 192])]), width=96)
    small = replace(small, fc2=InMemory(mlp.fc2.read()[:, half]))
    for cut, plain in zip(experts(spec, mlp, half, factors), experts(spec, small), strict=True):
        for name, mine in matrices(cut).items():
            torch.testing.assert_close(mine, matrices(plain)[name] * getattr(factors, name))


def _damage(ratio: float, mask: str) -> tuple[float, float]:
    """Relative error and gain of E8G1T2 with random rows."""
    mlp = random_mlp()
    generator = torch.Generator().manual_seed(1)
    x_TH = torch.randn(4096, 64, generator=generator)
    expected = swiglu_TH(mlp.fc1.read(), mlp.fc2.read(), x_TH)
    made = [(expert.fc1.read(), expert.fc2.read()) for expert in experts(drop_spec(ratio, drop_mask=mask), mlp)]
    layer = Layer(torch.randn(8, 64, generator=generator) * 0.02, made, None)
    found = layer.output_TH(x_TH, 2)
    return relative(found, expected), float((found * expected).sum() / expected.square().sum())


@pytest.mark.parametrize(
    ("ratio", "paper", "code"), [(0.1, 0.33, 0.55), (0.25, 0.52, 0.85), (0.5, 0.79, 1.11), (1.0, 1.23, 1.22)]
)
def test_the_damage_at_the_first_step_is_the_known_one(ratio: float, paper: float, code: float) -> None:
    """Figures of another implementation on another random model of the same sizes."""
    assert _damage(ratio, "shared")[0] == pytest.approx(paper, rel=0.08)
    assert _damage(ratio, "per-matrix")[0] == pytest.approx(code, rel=0.08)
    if ratio == 0.5:
        assert _damage(ratio, "shared")[1] == pytest.approx(0.50, abs=0.05)
        assert _damage(ratio, "per-matrix")[1] == pytest.approx(0.14, abs=0.05)


@pytest.mark.parametrize("values", [{"method": "drop"}, {"method": "copy", "noise": 0.01}], ids=str)
@pytest.mark.parametrize("to", ["hf", "torch_dist"])
def test_a_changed_model_is_written_the_same_with_any_workers_and_memory(
    to: Any, values: dict[str, Any], tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    model = upcycled(open_model(tiny_folder("llama")), UpcycleSpec(num_experts=4, seed=3, **values))
    held: list[dict[str, Tensor]] = []
    for number, options in enumerate([ConvertOptions(workers=1), ConvertOptions(workers=3, max_ram=1 << 20)]):
        execute(plan_conversion(model, tmp_path / f"{number}", to, options))
        folder = tmp_path / f"{number}"
        if to == "torch_dist":
            folder = tmp_path / f"back{number}"
            execute(plan_conversion(open_model(tmp_path / f"{number}"), folder, "hf", ConvertOptions(workers=1)))
        held.append({name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()})
    assert held[0].keys() == held[1].keys()
    assert all(torch.equal(held[0][name], held[1][name]) for name in held[0])
    dense_up = model.tensors["decoder.layers.0.mlp.experts.experts.1.linear_fc1.weight"].read()[96:]
    assert torch.equal(held[0]["model.layers.0.block_sparse_moe.experts.1.w3.weight"], dense_up)
