"""A mixture with every expert copied computes what it did: judged by transformers' own class on the written folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.model import Model, open_model
from ckptbridge.converters.tensors import InMemory, LazyTensor, join_rows, scaled
from ckptbridge.converters.upcycling.construction import upcycled
from ckptbridge.converters.upcycling.measured import LayerMeasurement
from ckptbridge.converters.upcycling.semantics import check
from ckptbridge.converters.upcycling.spec import UpcycleSpec
from tests.conftest import TinyFolders
from tests.converters.test_upcycle import TOLERANCE, weights, written
from tests.tiny import EVERY, reference_logits, token_ids

WEIGHS_ONE_BY_ONE = "phimoe"
MIXTURES = [name for name, tiny in EVERY.items() if tiny.is_moe and name != WEIGHS_ONE_BY_ONE]
UNGROUPED_SIGMOID = ["glm4_moe", "glm4_moe_air", "deepseek_v3_saved"]


def spec(experts: int, **values: Any) -> UpcycleSpec:
    return UpcycleSpec(**{"num_experts": experts, "method": "expert-upcycling", **values})


@cache
def logits_of(folder: Path) -> Tensor:
    return reference_logits(folder, token_ids())


def deviation(folder: Path, source: Path) -> float:
    expected = logits_of(source)
    return ((reference_logits(folder, token_ids()) - expected).abs().max() / expected.abs().max()).item()


def copied(source: Model, copies: int = 2, **values: Any) -> Model:
    return upcycled(source, spec(copies * (source.config.num_moe_experts or 0), **values))


@pytest.mark.parametrize("copies", [2, 3])
@pytest.mark.parametrize("name", MIXTURES)
def test_more_experts_compute_what_fewer_did(name: str, copies: int, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = open_model(tiny_folder(name))
    moe = copied(source, copies)
    assert check(spec(moe.config.num_moe_experts or 0).resolved(), source.config).is_exact
    folder = written(moe, tmp_path / "moe")
    assert deviation(folder, tiny_folder(name)) <= TOLERANCE
    back = open_model(folder)
    assert back.config.num_moe_experts == copies * (source.config.num_moe_experts or 0)
    assert back.config.moe_router_topk == copies * source.config.moe_router_topk
    assert back.family.name == source.family.name


@pytest.mark.parametrize("name", UNGROUPED_SIGMOID)
def test_a_copy_of_all_experts_can_be_a_group_of_which_one_is_chosen(
    name: str, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    source = open_model(tiny_folder(name))
    folder = written(copied(source, 3, router_groups=True), tmp_path / "moe")
    config = json.loads((folder / "config.json").read_text())
    assert (config["n_group"], config["topk_group"]) == (3, 1)
    assert config["num_experts_per_tok"] == source.config.moe_router_topk
    assert deviation(folder, tiny_folder(name)) <= TOLERANCE


@pytest.mark.parametrize("router_groups", [False, True])
def test_sigmoids_that_are_not_divided_by_their_sum(
    router_groups: bool, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    dense = with_config(tiny_folder("glm4_moe_air"), tmp_path / "source", norm_topk_prob=False)
    source = open_model(dense)
    assert source.config.moe_router_pre_softmax
    moe = copied(source, 2, router_groups=router_groups)
    assert moe.config.moe_router_topk_scaling_factor == (None if router_groups else 0.5)
    assert deviation(written(moe, tmp_path / "moe"), dense) <= TOLERANCE
    if not router_groups:
        wrong = replace(moe, hf_config={**moe.hf_config, "routed_scaling_factor": 1.0})
        assert deviation(written(wrong, tmp_path / "wrong"), dense) > 3 * TOLERANCE


def with_config(folder: Path, target: Path, **fields: Any) -> Path:
    """A copy of a folder with other fields in its config.json."""
    shutil.copytree(folder, target)
    file = target / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return target


@pytest.mark.parametrize("name", MIXTURES)
def test_more_experts_written_for_megatron_come_back(name: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    moe = copied(open_model(tiny_folder(name)))
    direct = written(moe, tmp_path / "direct")
    back = written(open_model(written(moe, tmp_path / "mcore", "torch_dist")), tmp_path / "back")
    mine, theirs = weights(direct), weights(back)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert (back / "config.json").read_bytes() == (direct / "config.json").read_bytes()


@pytest.mark.parametrize("form", ["torch_dist", "torch"])
def test_a_megatron_source_gives_the_same_experts(form: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    there = written(open_model(tiny_folder("qwen3_moe")), tmp_path / "mcore", form)
    mine = weights(written(copied(open_model(there)), tmp_path / "a"))
    theirs = weights(written(copied(open_model(tiny_folder("qwen3_moe"))), tmp_path / "b"))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_the_layers_that_predict_further_tokens_are_copied_too(tiny_folder: TinyFolders) -> None:
    source = open_model(tiny_folder("deepseek_v3"))
    moe = copied(source)
    stem = next(name for name in moe.tensors if name.startswith("mtp.") and ".experts.experts.0." in name)
    assert moe.tensors[stem.replace("experts.0.", "experts.16.")] is source.tensors[stem]
    router = next(name for name in moe.tensors if name.startswith("mtp.") and name.endswith("router.weight"))
    assert torch.equal(moe.tensors[router].read(), source.tensors[router].read().repeat(2, 1))


# ---- planted faults -------------------------------------------------------------------------------------------------

Fault = Callable[[dict[str, LazyTensor]], None]


def _one_row_turned(tensors: dict[str, LazyTensor]) -> None:
    name = "decoder.layers.2.mlp.router.weight"
    rows = tensors[name].read()
    rows[-1] = -rows[-1]
    tensors[name] = InMemory(rows)


def _one_expert_off_by_a_percent(tensors: dict[str, LazyTensor]) -> None:
    """Of whichever expert's copy: all of them, in one layer, so that one is met."""
    for name in list(tensors):
        if name.startswith("decoder.layers.3.mlp.experts.experts.") and name.endswith("fc2.weight"):
            tensors[name] = scaled(tensors[name], 1.01)
            return


def _copies_side_by_side(tensors: dict[str, LazyTensor]) -> None:
    """Copies next to each other, and groups that are meant to hold whole copies of the old ones."""
    for name in list(tensors):
        if name.endswith(("router.weight", "router.expert_bias")):
            rows = tensors[name]
            half = rows.shape[0] // 2
            order = [number // 2 + half * (number % 2) for number in range(2 * half)]
            tensors[name] = join_rows([rows] * len(order), [(i, i + 1) for i in order])
        elif ".experts.experts.1." in name:
            head, tail = name.split(".experts.experts.1.")
            held = [number for number in range(64) if f"{head}.experts.experts.{number}.{tail}" in tensors]
            half = len(held) // 2
            old = [tensors[f"{head}.experts.experts.{number}.{tail}"] for number in held]
            for number in held:
                tensors[f"{head}.experts.experts.{number}.{tail}"] = old[number // 2]


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        *((name, _one_row_turned) for name in ("mixtral", "qwen2_moe", "olmoe", "glm4_moe_air", "deepseek_v3")),
        ("mixtral", _one_expert_off_by_a_percent),
        ("gpt_oss", _one_row_turned),
        ("deepseek_v3", _copies_side_by_side),
    ],
)
def test_the_check_sees_planted_faults(name: str, fault: Fault, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    moe = copied(open_model(tiny_folder(name)))
    tensors = dict(moe.tensors)
    fault(tensors)
    assert deviation(written(replace(moe, tensors=tensors), tmp_path / "moe"), tiny_folder(name)) > 3 * TOLERANCE


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe_unnormalised", "glm4_moe_air"])
def test_what_is_called_inexact_is(name: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = open_model(tiny_folder(name))
    moe = copied(source, topk=source.config.moe_router_topk, allow_inexact=True)
    assert deviation(written(moe, tmp_path / "moe"), tiny_folder(name)) > 3 * TOLERANCE


# ---- other numbers of copies, noise ---------------------------------------------------------------------------------


def test_experts_are_copied_as_a_measurement_says(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = open_model(tiny_folder("mixtral"))
    measured = {layer: LayerMeasurement(order=torch.tensor([0, 1, 2, 3, layer, layer])) for layer in range(4)}
    moe = upcycled(source, spec(6, allow_inexact=True), measured)
    assert moe.config.moe_router_topk == 3
    stem = "decoder.layers.2.mlp.experts.experts"
    assert moe.tensors[f"{stem}.5.linear_fc1.weight"] is source.tensors[f"{stem}.2.linear_fc1.weight"]
    rows = source.tensors["decoder.layers.2.mlp.router.weight"].read()
    assert torch.equal(moe.tensors["decoder.layers.2.mlp.router.weight"].read(), rows[[0, 1, 2, 3, 2, 2]])
    assert reference_logits(written(moe, tmp_path / "moe"), token_ids()).isfinite().all()
    with pytest.raises(BadInputError, match="--calibrate"):
        upcycled(source, spec(6, allow_inexact=True))
    with pytest.raises(BadInputError, match="another model"):
        upcycled(
            source, spec(6, allow_inexact=True), {layer: LayerMeasurement(order=torch.arange(5)) for layer in range(4)}
        )


def test_a_little_noise_of_the_router_parts_the_copies(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = open_model(tiny_folder("mixtral"))
    assert any("equal gradients" in note for note in copied(source).notes)
    moe = copied(source, router_noise=1e-4)
    assert not any("equal gradients" in note for note in moe.notes)
    assert "noise of 0.0001" in check(spec(8, router_noise=1e-4).resolved(), source.config).inexact[0]
    assert len(moe.tensors["decoder.layers.0.mlp.router.weight"].read().unique(dim=0)) == 8
    assert TOLERANCE < deviation(written(moe, tmp_path / "moe"), tiny_folder("mixtral")) < 0.02


def test_noise_of_the_router_is_the_same_in_pieces(tiny_folder: TinyFolders) -> None:
    source = open_model(tiny_folder("glm4_moe_air"))
    name = "decoder.layers.1.mlp.router.weight"
    values: dict[str, Any] = {"router_groups": True, "router_noise": 0.01}
    one, other = (copied(source, seed=seed, **values).tensors[name] for seed in (1, 2))
    whole, plain = one.read(), source.tensors[name].read().repeat(2, 1)
    assert torch.equal(torch.cat([one.read_rows(0, 3), one.read_rows(3, len(whole))]), whole)
    assert (whole - plain).std().item() == pytest.approx(0.01, rel=0.1)
    assert not torch.equal(other.read(), whole)
    assert check(spec(16, **values).resolved(), source.config).inexact


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("mixtral", {"num_experts": 6}, ("num_experts 6", "4", "--num-experts 8")),
        ("mixtral", {"num_experts": 4}, ("num_experts is 4", "prune")),
        ("mixtral", {"num_experts": 8, "topk": 2}, ("topk is 2", "--topk 4")),
        ("glm4_moe", {"num_experts": 16, "topk": 3}, ("topk is 3", "--topk 6", "--router-groups")),
        ("mixtral", {"num_experts": 8, "topk": 9}, ("topk 9",)),
        ("mixtral", {"num_experts": 8, "router_groups": True}, ("router_groups", "sigmoid")),
        ("deepseek_v3", {"num_experts": 32, "router_groups": True}, ("router_groups", "4 groups")),
        ("deepseek_v3", {"num_experts": 20}, ("num_experts is 20", "--num-experts 32")),
        ("glm4_moe", {"num_experts": 16, "router_groups": True, "topk": 4}, ("topk is 4", "--topk 3")),
        ("phimoe", {"num_experts": 16}, ("one by one",)),
        ("mixtral", {"num_experts": 8, "granularity": 2}, ("granularity is 2",)),
        ("mixtral", {"num_experts": 8, "layers": "0"}, ("layers is '0'",)),
        ("mixtral", {"num_experts": 8, "shared": "overlap"}, ("shared",)),
        ("mixtral", {"num_experts": 8, "router": "sigmoid"}, ("router is 'sigmoid'",)),
        ("llama", {"num_experts": 8}, ("dense model", "virtual-group")),
    ],
    ids=str,
)
def test_what_would_not_preserve_the_model_is_refused(
    name: str, values: dict[str, Any], words: tuple[str, ...], tiny_folder: TinyFolders
) -> None:
    with pytest.raises(BadInputError) as refused:
        upcycled(open_model(tiny_folder(name)), UpcycleSpec(**{"method": "expert-upcycling", **values}))
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(("experts", "numbers"), [(7, "8"), (11, "8 or 12")])
def test_a_number_of_experts_is_offered_once(experts: int, numbers: str, tiny_folder: TinyFolders) -> None:
    with pytest.raises(BadInputError) as refused:
        upcycled(
            open_model(tiny_folder("mixtral")), UpcycleSpec(num_experts=experts, topk=2, method="expert-upcycling")
        )
    assert f"Use --num-experts {numbers}. " in str(refused.value)


def test_the_class_stays_and_has_to_be_able_to_say_it(tiny_folder: TinyFolders) -> None:
    source = open_model(tiny_folder("mixtral"))
    with pytest.raises(NotSupportedError, match="keeps the source's class"):
        copied(source, to="qwen2_moe")
    assert copied(source, to="mixtral").family.name == "mixtral"
    with pytest.raises(NotSupportedError, match=r"moe_router_topk|num_experts_per_tok"):
        copied(open_model(tiny_folder("phimoe")), allow_inexact=True)
