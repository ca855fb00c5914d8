"""Upcycled models in the real megatron-core: loaded strictly, told by their arguments, and the dense model's logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptbridge.converters.errors import NotSupportedError
from ckptbridge.converters.mcore.notes import unsaid
from ckptbridge.converters.model import Model, open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.upcycling.construction import upcycled
from ckptbridge.trainer.megatron.config import transformer_config
from ckptbridge.trainer.megatron.launch import Run, compute
from tests.conftest import TinyFolders
from tests.converters.upcycle_cases import EXACT, TOLERANCE, spec_of, written
from tests.megatron.flags_launch import command_for, read_by_megatron
from tests.megatron.launch import MEGATRON, Layout, Save, check_fetched, launch
from tests.tiny import reference_logits, token_ids
from tests.trainer.decoder_run import decoder_logits

pytestmark = pytest.mark.xdist_group("megatron")

ONE, TP, PP = ParallelLayout(), ParallelLayout(tp=2), ParallelLayout(pp=2)
EP, TP_EP, PP_EP = ParallelLayout(ep=2), ParallelLayout(tp=2, ep=2), ParallelLayout(pp=2, ep=2)
EP_ALONE, ETP = ParallelLayout(ep=4), ParallelLayout(tp=2, ep=2, etp=1)

RUNS: dict[tuple[str, str], tuple[ParallelLayout, ...]] = {
    ("llama", "copy E8G1T2"): (ONE, EP),
    ("llama", "shared partition"): (TP,),
    ("llama", "sigmoid, groups"): (EP,),
    ("mistral", "E3G3T6"): (ONE,),
    ("qwen2", "pre-softmax of zeros"): (ONE,),
    ("qwen2", "sigmoid, shared overlap"): (PP,),
    ("qwen3", "E4G4T4"): (EP_ALONE,),
    ("qwen3", "sigmoid"): (TP_EP,),
    ("qwen3", "every second layer"): (PP_EP,),
    ("nemotron", "E4G4T8"): (ONE, ETP),
    ("nemotron", "copy E8G1T2"): (PP,),
    ("nemotron", "shared partition"): (TP,),
    ("nemotron", "sigmoid, groups"): (EP,),
    ("nemotron", "first layers dense"): (PP_EP,),
    ("nemotron", "pre-softmax of zeros"): (ONE,),
}

ARGUMENTS: dict[str, dict[str, Any]] = {
    "copy E8G1T2": {"num_experts": 8, "moe_router_topk": 2, "moe_router_topk_scaling_factor": None},
    "pre-softmax of zeros": {"moe_router_pre_softmax": True, "moe_router_score_function": "softmax"},
    "sigmoid": {"moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 4.0},
    "sigmoid, groups": {
        **{"moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 2.0},
        **{"moe_router_num_groups": 4, "moe_router_group_topk": 2, "moe_router_enable_expert_bias": True},
    },
    "sigmoid, shared overlap": {"moe_shared_expert_intermediate_size": 96, "moe_shared_expert_gate": False},
    "every second layer": {"moe_layer_freq": [0, 1, 0, 1]},
}
"""What the checkpoint's arguments must say."""


FAULTS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("qwen2", "weights divided by their sum", "pre-softmax of zeros", {"moe_router_pre_softmax": False}),
    ("nemotron", "the scaling factor forgotten", "sigmoid, groups", {"moe_router_topk_scaling_factor": None}),
    ("nemotron", "another activation", "E4G4T8", {"activation_func": "gelu"}),
    ("llama", "another top-k", "copy E8G1T2", {"moe_router_topk": 4, "moe_router_pre_softmax": True}),
)
"""A model, and what megatron-core is told falsely of it."""


@dataclass(frozen=True, slots=True)
class Done:
    """A run's largest difference of a logit, and the keys that did not match."""

    difference: float
    keys: tuple[tuple[str, ...], tuple[str, ...]]


Models = dict[tuple[str, str], Model]


def _mistold(model: Model, told: dict[str, Any]) -> Run:
    return Run(model=replace(model, config=replace(model.config, **told)), layout=ONE)


@pytest.fixture(scope="module")
def models(tiny_folder: TinyFolders, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The upcycled models, written for Megatron and opened again."""
    root = tmp_path_factory.mktemp("upcycled")
    made: Models = {}
    for number, (name, kind) in enumerate(RUNS):
        moe = upcycled(open_model(tiny_folder(name)), spec_of(EXACT[kind], to="mcore"))
        made[name, kind] = open_model(written(moe, root / str(number), "torch_dist", layout=TP))
    return made


@pytest.fixture(scope="module")
def done(
    models: Models, tiny_folder: TinyFolders, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], list[Done]]:
    check_fetched()
    ids_T = token_ids(batch=1)[0]
    expected = {name: reference_logits(tiny_folder(name), ids_T[None])[0] for name in {name for name, _ in RUNS}}
    keyed = [(key, Run(model=models[key], layout=layout)) for key, layouts in RUNS.items() for layout in layouts]
    keyed += [((name, fault), _mistold(models[name, kind], told)) for name, fault, kind, told in FAULTS]
    found: dict[tuple[str, str], list[Done]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(MEGATRON))
        computed = compute([run for _, run in keyed], ids_T, torch.float32, tmp_path_factory.mktemp("runs"))
        for (key, _), one in zip(keyed, computed, strict=True):
            difference = (one.logits_TV - expected[key[0]]).abs().max().item()
            found.setdefault(key, []).append(Done(difference, (one.missing_keys, one.unexpected_keys)))
    return found


@pytest.mark.parametrize(("name", "kind"), RUNS)
def test_megatron_loads_strictly_and_computes_the_dense_models_function(
    name: str,
    kind: str,
    done: dict[tuple[str, str], list[Done]],
    record_property: Callable[[str, object], None],
) -> None:
    assert [one.keys for one in done[name, kind]] == [((), ())] * len(RUNS[name, kind])
    worst = max(one.difference for one in done[name, kind])
    record_property("max_abs_diff", worst)
    assert worst <= TOLERANCE


@pytest.mark.parametrize(("name", "fault"), [(name, fault) for name, fault, *_ in FAULTS])
def test_a_router_that_is_told_falsely_is_seen(name: str, fault: str, done: dict[tuple[str, str], list[Done]]) -> None:
    (one,) = done[name, fault]
    assert one.difference > 100 * TOLERANCE


ALIKE = (("mistral", "E3G3T6"), ("nemotron", "copy E8G1T2"), ("nemotron", "pre-softmax of zeros"))
"""Models whose arguments are a mixture of others'."""
MISSING_FLAGS = [
    (("llama", "copy E8G1T2"), "--moe-router-dtype", "moe_router_dtype"),
    (("nemotron", "sigmoid, groups"), "--moe-router-num-groups", "moe_router_num_groups"),
]


def test_the_arguments_tell_megatron_all_of_it(models: Models) -> None:
    """Megatron-LM's own parser, given the checkpoint's arguments and the printed flags, makes the same config.

    It does not without one of the flags.
    """
    check_fetched()
    told = {key: model for key, model in models.items() if key not in ALIKE}
    commands = [command_for(model, TP) for model in told.values()]
    commands += [replace(command_for(models[key], TP), without=flag) for key, flag, _ in MISSING_FLAGS]
    reads = read_by_megatron(commands)
    for key, read in zip(told, reads, strict=False):
        assert (read.error, read.differences) == ("", {}), key
    for (_, flag, field), read in zip(MISSING_FLAGS, reads[len(told) :], strict=True):
        assert read.error or field in read.differences, flag


@pytest.mark.parametrize(("name", "kind"), RUNS)
def test_the_arguments_name_the_router(name: str, kind: str, models: Models) -> None:
    saved = models[name, kind].saved
    assert saved is not None
    args = vars(saved.args)
    expected = {"moe_router_dtype": "fp32", **ARGUMENTS.get(kind, {})}
    if name == "nemotron":
        expected |= {"squared_relu": True, "swiglu": False, "normalization": "LayerNorm", "apply_layernorm_1p": True}
    assert {field: args[field] for field in expected} == expected
    assert unsaid(models[name, kind].config) == {}


def test_one_chosen_sigmoid_is_not_divided_by_its_sum_there(tiny_folder: TinyFolders) -> None:
    values = {"num_experts": 4, "topk": 1, "router": "sigmoid", "allow_inexact": True}
    config = upcycled(open_model(tiny_folder("llama")), spec_of(values)).config
    assert "moe_router_topk" in unsaid(config)
    with pytest.raises(NotSupportedError, match="moe_router_topk is 1"):
        transformer_config(config)


def test_nemotrons_mixture_comes_back_from_megatrons_own_files(models: Models, tmp_path: Path) -> None:
    """Saved by megatron-core, under Transformer Engine's names and its own, and understood by the arguments alone."""
    config = models["nemotron", "sigmoid, groups"].config
    saves = [
        Save(
            folder=tmp_path / str(local_names),
            layout=Layout(tp=2, ep=2),
            config=transformer_config(config, tp=2),
            tokens=token_ids(),
            local_names=local_names,
        )
        for local_names in (False, True)
    ]
    for save, result in zip(saves, launch(saves), strict=True):
        assert not result.error, result.error
        assert result.logits is not None
        found = open_model(save.folder)
        assert found.family.name == "nemotron_moe"
        difference = decoder_logits(save.folder) - result.logits[..., : found.config.vocab_size]
        assert difference.abs().max() <= TOLERANCE
