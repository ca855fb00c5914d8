"""What cannot be carried is refused before a byte is written, by name; what is not carried is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.mcore.optimizer.settings import read_settings
from ckptbridge.converters.model import Model, open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from tests.conftest import TinyFolders
from tests.converters.runs import assert_same, group, held, megatron_optimizer, reshard, reshard_plan, save_run
from tests.converters.test_fsdp_dtensor import state_of, written

PLAIN = ParallelLayout()


def refused(source: Model, target: Path, to: str = "torch_dist", *, optimizer: str = "keep") -> str:
    with pytest.raises(BadInputError) as error:
        reshard_plan(source, target, to, PLAIN, optimizer=optimizer)
    assert not target.exists()
    return str(error.value)


def legacy(tiny_folder: TinyFolders, root: Path, kind: str, name: str = "llama", **layout: int) -> Path:
    """A legacy checkpoint with an optimizer; returns the folder of the first rank."""
    source = save_run(tiny_folder(name), root / "run", optimizer=megatron_optimizer())
    reshard(source, root / "legacy", "torch", ParallelLayout(**layout), optimizer=kind)
    return min((root / "legacy" / "iter_0000007").iterdir())


def edit(file: Path, change: Callable[[Any], None]) -> None:
    """Change what a file of torch.save holds."""
    held = torch.load(file, weights_only=False)
    change(held)
    torch.save(held, file)


@pytest.mark.parametrize(
    "sharding", ["dp_reshardable", "dp_zero_gather_scatter", "fully_sharded_bucket_space", "another"]
)
def test_optimizers_that_follow_a_runs_buffers_are_refused_by_name(
    sharding: str, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    source = save_run(tiny_folder("llama"), tmp_path / "run", optimizer=megatron_optimizer())
    assert source.saved is not None
    source.saved.common["content_metadata"]["distrib_optim_sharding_type"] = sharding
    told = refused(source, tmp_path / "made")
    assert sharding in told
    assert "--no-optimizer" in told
    if sharding != "another":
        assert "--dist-ckpt-optim-fully-reshardable" in told
    reshard(source, tmp_path / "weights", "torch_dist", PLAIN, optimizer="none")


def test_older_buckets_without_a_word_are_known_by_their_objects(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = save_run(tiny_folder("llama"), tmp_path / "run", states=(), optimizer=None)
    assert source.saved is not None
    objects: Any = source.saved
    objects.objects["optimizer.distributed.dp_group_idx_0.param_state/shard_0_1"] = None
    assert "dp_zero_gather_scatter" in refused(source, tmp_path / "made")


def test_forms_that_a_format_does_not_hold_are_refused(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = save_run(tiny_folder("llama"), tmp_path / "run", optimizer=megatron_optimizer())
    assert "distributed, plain" in refused(source, tmp_path / "a", "torch", optimizer="fully_reshardable")
    assert "fully_reshardable, plain" in refused(source, tmp_path / "b", "torch_dist", optimizer="distributed")
    bare = save_run(tiny_folder("llama"), tmp_path / "bare", states=())
    assert "no optimizer" in refused(bare, tmp_path / "c", optimizer="plain")
    assert "hf2mcore" in refused(open_model(tiny_folder("llama")), tmp_path / "d")


def test_a_trainers_own_optimizer_stays_in_its_form(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = save_run(tiny_folder("llama"), tmp_path / "run")
    for to in ("torch", "torch_dist"):
        assert "param_groups" in refused(source, tmp_path / "made", to, optimizer="plain")


def test_moments_without_main_weights_of_half_precision_are_refused(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = save_run(
        tiny_folder("llama"), tmp_path / "run", optimizer=megatron_optimizer(), states=("exp_avg", "exp_avg_sq")
    )
    assert "no fp32 main weights" in refused(source, tmp_path / "made")


def test_main_weights_that_are_not_the_weights_are_refused(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    """As megatron-core saves them when its buffers' padding shifts them."""
    hf = tiny_folder("llama")
    save_run(hf, tmp_path / "run", optimizer=megatron_optimizer())
    source = open_model(tmp_path / "run")
    tensors: Any = source.tensors
    one, other = (f"decoder.layers.{n}.mlp.linear_fc2.weight" for n in (0, 1))
    tensors[one], tensors[other] = tensors[other], tensors[one]
    told = refused(source, tmp_path / "made")
    assert one in told
    assert "2 parameters" in told


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda o: o["state"][2].pop("exp_avg"), ("exp_avg of index 2", "missing")),
        (lambda o: o["state"].pop(0), ("exp_avg of index 0", "embedding.word_embeddings.weight")),
        (lambda o: o["state"][1].update(exp_avg_sq=torch.zeros(3, 4)), ("exp_avg_sq of index 1", "[64, 64]", "[3, 4]")),
        (lambda o: o["param_groups"][0]["params"].pop(), ("group 0", "17 parameters", "18 such")),
        (lambda o: o["param_groups"].pop(), ("1 groups hold 18", "27 parameters")),
        (lambda o: o.pop("param_groups"), ("param_groups",)),
        (lambda o: o["param_groups"][0].update(params=None), ("no list of parameters",)),
    ],
    ids=["no moment", "no state", "shape", "group too small", "no group", "no groups", "no parameters"],
)
def test_a_plain_optimizer_that_does_not_fit_the_model_is_refused(
    change: Callable[[Any], None], words: tuple[str, ...], tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    rank = legacy(tiny_folder, tmp_path, "plain")
    edit(rank / "model_optim_rng.pt", lambda held: change(held["optimizer"]["optimizer"]))
    told = refused(open_model(tmp_path / "legacy"), tmp_path / "made")
    assert str(rank / "model_optim_rng.pt") in told
    for word in words:
        assert word in told


def _swap_masters(held: Any) -> None:
    first = held["optimizer"]["fp32_from_fp16_params"][0]
    first[1], first[5] = first[5], first[1]  # linear_proj of two layers: the same shape


def test_main_weights_in_another_order_are_refused(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    rank = legacy(tiny_folder, tmp_path, "plain")
    edit(rank / "model_optim_rng.pt", _swap_masters)
    assert "does not round to the weight" in refused(open_model(tmp_path / "legacy"), tmp_path / "made")


def _buffer(held: Any) -> dict[str, Any]:
    ((_, states),) = held[0].items()
    return states


def _roll(held: Any) -> None:
    for state in ("param", "exp_avg", "exp_avg_sq"):
        _buffer(held)[state] = _buffer(held)[state].roll(64)


def _one_bucket_less(held: Any) -> None:
    for state in ("param", "exp_avg", "exp_avg_sq"):
        _buffer(held)[state] = _buffer(held)[state][:-48].clone()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_roll, ("does not round to the weight",)),
        (_one_bucket_less, ("buffer 0: param", "expected", "bucket sizes")),
        (lambda held: _buffer(held).pop("exp_avg_sq"), ("buffer 0: exp_avg_sq is missing",)),
        (lambda held: held.update({1: held[0]}), ("holds 2 buffers, the model has 1",)),
        (lambda held: held.pop("buckets_coalesced"), ("February 2024",)),
        (lambda held: held.update({0: {}}), ("one pair of dtypes",)),
    ],
    ids=["shifted", "shorter", "no moment", "two buffers", "old", "empty"],
)
def test_flat_buffers_that_do_not_fit_the_model_are_refused(
    change: Callable[[Any], None], words: tuple[str, ...], tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    rank = legacy(tiny_folder, tmp_path, "distributed", "qwen3", tp=2)
    edit(rank / "distrib_optim.pt", change)
    told = refused(open_model(tmp_path / "legacy"), tmp_path / "made")
    assert "distrib_optim.pt" in told
    for word in words:
        assert word in told


def test_missing_buffers_are_named(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    rank = legacy(tiny_folder, tmp_path, "distributed", tp=2)
    (rank / "distrib_optim.pt").unlink()
    assert "no rank's file holds the optimizer state" in refused(open_model(tmp_path / "legacy"), tmp_path / "made")
    for other in rank.parent.iterdir():
        (other / "distrib_optim.pt").unlink(missing_ok=True)
    assert "distrib_optim.pt: is missing" in refused(open_model(tmp_path / "legacy"), tmp_path / "made")


def test_a_layer_wise_optimizer_is_refused_by_name(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    rank = legacy(tiny_folder, tmp_path, "plain")
    (rank / "layer_wise_optimizer_0.pt").touch()
    assert "layer-wise" in refused(open_model(tmp_path / "legacy"), tmp_path / "made")


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ([{}, {}, {}], "holds 3 values"),
        ("text", "holds 1 values"),
        ({"optimizer": {"param_groups": [1]}}, "no list of dicts"),
        ({"optimizer": {"param_groups": [group(1.0), group(0.0, step=8)]}}, "different steps"),
        ({"optimizer": {"param_groups": [group(1.0)]}, "sgd": 1}, "sgd"),
    ],
)
def test_settings_that_are_none_are_refused(saved: Any, words: str) -> None:
    with pytest.raises(BadInputError, match=words):
        read_settings(saved, "here")


def test_settings_are_read_from_every_form() -> None:
    one = {"optimizer": {"param_groups": [group(1.0), group(0.0)]}}
    two = {"optimizer": {"param_groups": [group(1.0, experts=True)]}}
    for saved in ({0: one, 1: two}, [one, two]):
        settings = read_settings(saved, "here")
        assert settings.step == 7
        assert settings.experts is not None
        assert [len(part) for part in settings.parts] == [2, 1]
        assert settings.split(experts_apart=False).experts is None
    joined = read_settings(one, "here")
    assert joined.split(experts_apart=True).experts == read_settings([one, two], "here").experts
    counted = {"state": {"common_step": torch.tensor(3.0)}, "param_groups": [{"wd_mult": 1.0}]}
    assert read_settings({"optimizer": counted}, "here").step == 3.0
    assert read_settings(counted, "here").step == 3.0  # fp32


def test_objects_that_fit_another_layout_only_are_told(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = save_run(tiny_folder("llama"), tmp_path / "run", optimizer=megatron_optimizer())
    saved: Any = source.saved
    template = next(info for key, info in saved.objects.items() if "_extra_state" in key)
    saved.objects["rng_state/shard_0.0_1.1"] = template
    saved.objects["rerun_state_machine_state/shard_0_4"] = template
    saved.objects["dataloader/shard_0_1"] = template
    saved.objects["cuts/shard_1_4"] = template
    saved.common["rerun_state_machine"] = {"mode": "disabled"}
    stays = reshard_plan(source, tmp_path / "same", "torch_dist", PLAIN)
    assert any("cuts/shard_1_4" in note for note in stays.notes)
    assert not any("random states" in note or "rerun" in note for note in stays.notes)
    moves = reshard_plan(source, tmp_path / "made", "torch_dist", ParallelLayout(tp=2))
    for word in ("cuts/shard_1_4", "random states", "rerun_state_machine"):
        assert any(word in note for note in moves.notes)
    assert any("--no-load-rng" in note for note in reshard_plan(source, tmp_path / "old", "torch", PLAIN).notes)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_optimizer_of_megatron_fsdp_is_refused_and_its_weights_are_carried(
    tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    state = state_of(tiny_folder("llama"))
    moments = {
        f"optimizer.state.{key.removeprefix('model.')}.exp_avg": torch.zeros_like(value)
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }
    source = open_model(written(state | moments, tmp_path / "fsdp"))
    assert "fsdp_dtensor" in refused(source, tmp_path / "made")
    made = reshard(source, tmp_path / "made", "torch", ParallelLayout(tp=2), optimizer="none")
    assert_same({"": held(made)[""]}, {"": held(replace(source, saved=None))[""]})
