"""Optimizers of mixtures: expert biases, which have no state in Megatron; experts' biases, which are not decayed."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptbridge.converters import training_checkpoint
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.mcore.fsdp_dtensor_reader import open_fsdp_dtensor
from ckptbridge.converters.mcore.optimizer.settings import OptimizerSettings
from ckptbridge.converters.mcore.optimizer.state import open_optimizer
from ckptbridge.converters.model import Model, decoder_tensors, open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.receipt import read_receipt
from ckptbridge.converters.recheck import recheck
from ckptbridge.converters.torch_archive import read_archive
from ckptbridge.converters.training_checkpoint import load_training_checkpoint
from tests.conftest import TinyFolders
from tests.converters.runs import (
    ITERATION,
    STATES,
    assert_same,
    drawn,
    expected,
    group,
    held,
    megatron_optimizer,
    reshard,
    reshard_plan,
    save_run,
)
from tests.converters.test_fsdp_dtensor import state_of, written

CHAIN = (
    ("torch", ParallelLayout(ep=2, pp=2), "plain"),
    ("torch", ParallelLayout(pp=2, vpp=2), "distributed"),
    ("torch_dist", ParallelLayout(ep=2), "plain"),
    ("torch", ParallelLayout(tp=2, ep=2), "distributed"),
    ("torch", ParallelLayout(), "plain"),
    ("torch_dist", ParallelLayout(tp=2), "fully_reshardable"),
)


def _with_states_of_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on runs are saved as this trainer saved them when it wrote a state of every weight."""
    monkeypatch.setattr(training_checkpoint, "has_optimizer_state", lambda name: True)


def _keys_of_biases(model: Model) -> set[str]:
    return {key for key in model.saved.tensors if key.endswith(".expert_bias")}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("deepseek_v3", torch.bfloat16),
        ("glm4_moe_air", torch.float32),
        ("minimax_m2", torch.bfloat16),
        ("gpt_oss", torch.float32),
    ],
)
def test_every_form_becomes_every_other(
    name: str, dtype: torch.dtype, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    """As Megatron saves such a run: around the chain everything is there bit for bit after each link."""
    model = save_run(tiny_folder(name), tmp_path / "run", dtype=dtype, optimizer=megatron_optimizer())
    assert not any(key.startswith("optimizer.") for key in _keys_of_biases(model))
    wanted = expected(model, dtype)
    for number, (to, layout, kind) in enumerate(CHAIN):
        target = tmp_path / str(number)
        model = reshard(model, target, to, layout, optimizer=kind)
        found = held(model)
        if dtype == torch.float32 and "param" not in found:  # a plain optimizer in fp32 has no main weights
            found["param"] = {name: found[""][name] for name in wanted["param"]}
        assert_same(found, wanted)
        optimizer = open_optimizer(model)
        assert optimizer is not None
        assert optimizer.settings is not None
        assert [g["wd_mult"] for g in optimizer.settings.dense] == [1.0, 0.0]
        assert recheck(model, read_receipt(target)).passed
    assert not any(key.startswith("optimizer.") for key in _keys_of_biases(model))


@pytest.mark.parametrize("name", ["deepseek_v3", "minimax_m2"])
def test_states_that_the_trainer_once_saved_are_passed_over(
    name: str, tiny_folder: TinyFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_states_of_biases(monkeypatch)
    source = save_run(tiny_folder(name), tmp_path / "run")
    monkeypatch.undo()
    assert any(key.startswith("optimizer.state.exp_avg.") for key in _keys_of_biases(source))
    made = reshard(source, tmp_path / "made", "torch_dist", ParallelLayout(pp=2, ep=2))
    assert not any(key.startswith("optimizer.") for key in _keys_of_biases(made))
    for model in (source, made):
        assert_same(held(model), expected(source))
    receipt = read_receipt(tmp_path / "made")
    assert recheck(made, receipt).passed
    assert recheck(source, receipt).passed
    whole = tmp_path / "as megatron saves"
    reshard(save_run(tiny_folder(name), tmp_path / "run2"), whole, "torch_dist", ParallelLayout(pp=2, ep=2))
    assert read_receipt(whole).target_tensors == receipt.target_tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("is_old", [False, True], ids=["as it saves", "as it once saved"])
def test_the_trainer_is_given_a_state_of_every_weight(
    is_old: bool, dtype: torch.dtype, tiny_folder: TinyFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An expert bias is its own main weight, and its moments are zero, as of all that is not trained."""
    if is_old:
        _with_states_of_biases(monkeypatch)
    source = save_run(tiny_folder("deepseek_v3"), tmp_path / "run", dtype=dtype)
    monkeypatch.undo()
    reshard(source, tmp_path / "made", "torch_dist", ParallelLayout(tp=2))
    for folder in (tmp_path / "run", tmp_path / "made"):
        back = load_training_checkpoint(folder)
        assert back.iteration == ITERATION
        weights = drawn(source, "", dtype)
        for state in STATES:
            assert back.optimizer[state].keys() == weights.keys()
            for name, tensor in drawn(source, state).items():
                if name.endswith(".expert_bias"):
                    tensor = weights[name] if state == "param" else torch.zeros_like(tensor)
                found = back.optimizer[state][name].read()
                assert found.dtype == torch.float32
                assert torch.equal(found, tensor), f"{state} {name}"


def test_in_fp32_expert_biases_are_the_weights(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = save_run(tiny_folder("deepseek_v3"), tmp_path / "run", optimizer=megatron_optimizer())
    for to in ("torch_dist", "torch"):
        made = reshard(source, tmp_path / to, to, ParallelLayout(tp=2), dtype=torch.float32)
        assert_same({"": held(made)[""]}, {"": drawn(source, "param") | _biases(source)})


def _biases(model: Model) -> dict[str, torch.Tensor]:
    return {n: t.read() for n, t in decoder_tensors(model.tensors, model.config).items() if n.endswith(".expert_bias")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_flat_buffers_hold_no_expert_bias(dtype: torch.dtype, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    """A buffer for each chunk, as long as its parameters are one behind the other, each from a multiple of 64 on."""
    source = save_run(tiny_folder("glm4_moe_air"), tmp_path / "run", dtype=dtype, optimizer=megatron_optimizer())
    reshard(source, tmp_path / "made", "torch", ParallelLayout(pp=2, vpp=2))
    biases = 0
    for rank in sorted((tmp_path / "made").glob("iter_*/mp_rank_*")):
        saved, _ = read_archive(rank / "model_optim_rng.pt")
        buffers, _ = read_archive(rank / "distrib_optim.pt")
        assert buffers.keys() == {"buckets_coalesced", 0, 1}
        for number in range(2):
            tensors = [t for k, t in saved[f"model{number}"].items() if t is not None and ".expert_bias" not in k]
            biases += sum(".expert_bias" in key for key in saved[f"model{number}"])
            length = 0
            for tensor in reversed(tensors):
                length = -(-length // 64) * 64 + prod(tensor.shape)
            ((pair, states),) = buffers[number].items()
            assert pair == (dtype, torch.float32)
            assert {states[state].shape for state in STATES} == {(length,)}
            assert states["numel_unpadded"] == length
    assert biases == 3  # the first of four layers is dense


def test_a_weight_that_is_trained_must_have_its_state(
    tiny_folder: TinyFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the expert bias is forgiven: not a router's weight, nor a bias of another module."""
    for name, missing in (("deepseek_v3", ".mlp.router.weight"), ("gpt_oss", ".mlp.router.bias")):
        monkeypatch.setattr(training_checkpoint, "has_optimizer_state", lambda n, end=missing: not n.endswith(end))
        source = save_run(tiny_folder(name), tmp_path / name, optimizer=megatron_optimizer())
        with pytest.raises(BadInputError, match=rf"missing: .*{missing}"):
            reshard_plan(source, tmp_path / "made", "torch_dist", ParallelLayout(tp=2))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_megatron_fsdp_keeps_no_moment_of_an_expert_bias_either(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    hf = tiny_folder("glm4_moe_air")
    state = state_of(hf)
    moments = {
        f"optimizer.state.{key.removeprefix('model.')}.exp_avg": value + 1
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and not key.endswith(".expert_bias")
    }
    folder = open_fsdp_dtensor(written(state | moments, tmp_path / "fsdp"))
    model = open_model(hf)
    trained = {name for name in model.tensors if not name.endswith(".expert_bias")}
    assert folder.states() == ("param", "exp_avg")
    for kind, more in (("", 0.0), ("param", 0.0), ("exp_avg", 1.0)):
        tensors = folder.parameters(model.family, model.config, kind)
        assert tensors.keys() == (trained if kind else model.tensors.keys())
        assert all(torch.equal(tensor.read(), model.tensors[name].read() + more) for name, tensor in tensors.items())


# ---- experts with biases --------------------------------------------------------------------------------------------


def _wd_mults(settings: OptimizerSettings | None) -> list[list[tuple[float, bool]]]:
    assert settings is not None
    return [[(g["wd_mult"], g["is_expert_parallel"]) for g in part] for part in settings.parts]


DENSE = [(1.0, False), (0.0, False)]


@pytest.mark.parametrize(("to", "kind"), [("torch_dist", "keep"), ("torch_dist", "plain"), ("torch", "plain")])
@pytest.mark.parametrize(("name", "experts"), [("gpt_oss", [(1.0, True), (0.0, True)]), ("qwen3_moe", [(1.0, True)])])
def test_experts_with_biases_have_an_undecayed_group(
    name: str, experts: list[Any], to: str, kind: str, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    """Megatron makes a group of what there is, here and in the optimizer that dealt experts have of their own."""
    source = save_run(tiny_folder(name), tmp_path / "run", optimizer=megatron_optimizer())
    apart = reshard(source, tmp_path / "apart", to, ParallelLayout(ep=2), optimizer=kind)
    optimizer = open_optimizer(apart)
    assert optimizer is not None
    assert _wd_mults(optimizer.settings) == [DENSE, experts]
    assert_same(held(apart), expected(source))
    together = reshard(apart, tmp_path / "together", "torch_dist", ParallelLayout(), optimizer="keep")
    optimizer = open_optimizer(together)
    assert optimizer is not None
    assert _wd_mults(optimizer.settings) == [DENSE]
    assert_same(held(together), expected(source))


def test_experts_take_no_group_with_a_learning_rate_of_its_own() -> None:
    own = group(1.0, is_decoupled_lr=True), group(0.0, is_decoupled_lr=True)
    settings = OptimizerSettings(dense=(group(1.0), group(0.0), *own), experts=None, step=7)
    for has_undecayed, wanted in ((False, [1.0]), (True, [1.0, 0.0])):
        made = settings.split(experts_apart=True, has_undecayed_experts=has_undecayed)
        assert made.dense == settings.dense
        assert made.experts is not None
        assert [g["wd_mult"] for g in made.experts] == wanted
        assert not any(g["is_decoupled_lr"] for g in made.experts)


def test_a_grouped_expert_has_its_bias_behind_its_matrix(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    """As Transformer Engine registers them: flat buffers are laid out in that order."""
    source = save_run(tiny_folder("gpt_oss"), tmp_path / "run", optimizer=megatron_optimizer())
    reshard(source, tmp_path / "made", "torch", ParallelLayout(ep=4))
    for rank in sorted((tmp_path / "made").glob("iter_*/mp_rank_*")):
        saved, _ = read_archive(rank / "model_optim_rng.pt")
        keys = [k.split("layers.0.mlp.experts.")[1] for k, t in saved["model"].items() if t and "layers.0.mlp.exp" in k]
        assert keys == [f"linear_fc{n}.{leaf}{expert}" for n in "12" for expert in "01" for leaf in ("weight", "bias")]
