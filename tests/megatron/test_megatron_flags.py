"""What `launch megatron` prints, read by Megatron-LM's own parser, gives the TransformerConfig of the model."""

from __future__ import annotations

import math
from argparse import Namespace
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.errors import NotSupportedError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.fields import read_config
from ckptbridge.converters.mcore.args_reading import config_from_args
from ckptbridge.converters.mcore.flags import TOLD_BY_ANOTHER, Flag
from ckptbridge.converters.mcore.notes import groups_are_ranked_alike, unsaid
from ckptbridge.converters.model import Model, open_model
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.registry import family_of
from tests.conftest import TinyFolders
from tests.converters.published import PUBLISHED
from tests.megatron.flags_launch import Command, Read, command_for, command_without_arguments, read_by_megatron
from tests.megatron.launch import check_fetched
from tests.tiny import EVERY

pytestmark = pytest.mark.xdist_group("megatron")


def config_of(name: str) -> ModelConfig:
    """A published model, from its config.json."""
    family = family_of(PUBLISHED[name], name)
    return read_config(family.fields, PUBLISHED[name], name)


COMPUTED = [name for name, model in EVERY.items() if not model.not_in_megatron]
LAYOUT = ParallelLayout(tp=2, pp=2)
LAYOUTS = {
    ("llama", "tp4"): ParallelLayout(tp=4),
    ("llama", "vpp"): ParallelLayout(pp=2, vpp=2),
    ("llama", "uneven"): ParallelLayout(pp=2, first_stage_layers=1),
    ("mixtral", "ep"): ParallelLayout(tp=2, ep=2, etp=1),
    ("qwen3_moe_dense_first", "uneven"): ParallelLayout(tp=2, pp=3, ep=2, first_stage_layers=2, last_stage_layers=1),
}
PUBLISHED_MODELS = {name: config_of(name) for name in PUBLISHED}
SILENT = {
    "rope_scaling": {"gpt.rope_scaling_factor", "original_max_position_embeddings", "beta_fast"},
    "activation_func": {"activation_func", "gated_linear_unit"},
}
"""What differs for a field that Megatron-LM cannot be told, though megatron-core can. Notes name the field."""
OF_NO_MODEL = {
    *("--load", "--ckpt-format", "--use-checkpoint-args", "--no-rope-fusion"),
    "--rope-scaling-factor",  # parsed, and passed on to nobody
}
"""Flags whose absence is felt elsewhere: no checkpoint is found, or a kernel refuses its work."""


@dataclass(frozen=True, slots=True)
class Done:
    """A command line, and what Megatron-LM made of it."""

    command: Command
    read: Read


Commands = dict[tuple[str, ...], Done]


@pytest.fixture(scope="module")
def commands(tiny_folder: TinyFolders, tmp_path_factory: pytest.TempPathFactory) -> Commands:
    """By model and "saved", "told all", "published", "bf16" or a layout; by any of these with "without" and a flag."""
    check_fetched()
    root = tmp_path_factory.mktemp("flags")
    models = {name: _converted(tiny_folder(name), root / name, layout_of(name)) for name in COMPUTED}
    half = _converted(tiny_folder("llama"), root / "bf16", LAYOUT, dtype=torch.bfloat16)
    made: dict[tuple[str, ...], Command] = {
        **{(name, "saved"): command_for(model, layout_of(name)) for name, model in models.items()},
        **{key: command_for(models[key[0]], layout) for key, layout in LAYOUTS.items()},
        ("llama", "bf16"): command_for(half, LAYOUT),
    }
    told_by: dict[Flag, tuple[str, ...]] = {}  # the first command that has a flag with these values
    for key, command in made.items():
        for flag in command.flags:
            told_by.setdefault(flag, key)
    made |= {
        (*key, "without", *flag): replace(made[key], without=flag[0])
        for flag, key in told_by.items()
        if flag[0] not in OF_NO_MODEL
    }
    for name, model in models.items():
        made[name, "told all"] = command_without_arguments(model.config, layout_of(name))
    for name, config in PUBLISHED_MODELS.items():
        with suppress(NotSupportedError):
            made[name, "published"] = command_without_arguments(config, ParallelLayout())
    read = read_by_megatron(list(made.values()))
    return {key: Done(command, done) for (key, command), done in zip(made.items(), read, strict=True)}


def layout_of(name: str) -> ParallelLayout:
    """Megatron-LM does not cut experts that have biases."""
    return replace(LAYOUT, etp=1) if EVERY[name].hf_class == "GptOss" else LAYOUT


def _converted(source: Path, target: Path, layout: ParallelLayout, dtype: torch.dtype | None = None) -> Model:
    execute(plan_conversion(open_model(source), target, "torch_dist", ConvertOptions(layout=layout, dtype=dtype)))
    return open_model(target)


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("how", ["saved", "told all"])
def test_the_flags_rebuild_the_transformer_config(
    commands: Commands, tiny_folder: TinyFolders, name: str, how: str
) -> None:
    read = commands[name, how].read
    assert not read.error
    silent = [SILENT[field] for field in unsaid(open_model(tiny_folder(name)).config) if field in SILENT]
    assert read.differences.keys() <= set().union(*silent), read.differences
    assert all(read.differences.keys() & fields for fields in silent)


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_sizes_are_told_or_said_to_be_untold(commands: Commands, name: str) -> None:
    untold = unsaid(PUBLISHED_MODELS[name])
    done = commands.get((name, "published"))
    if done is None:
        assert untold, "megatron-core cannot compute it, and nothing is said of that"
        return
    assert not done.read.error
    silent = [SILENT[field] for field in untold]
    assert done.read.differences.keys() <= set().union(*silent), done.read.differences
    assert all(done.read.differences.keys() & fields for fields in silent)


@pytest.mark.parametrize("name", COMPUTED)
def test_what_that_run_saves_is_read_as_the_same_model(commands: Commands, tiny_folder: TinyFolders, name: str) -> None:
    """Megatron-LM saves its own arguments and no others."""
    config = open_model(tiny_folder(name)).config
    read = config_from_args(Namespace(**commands[name, "saved"].read.args), "args")
    untold = unsaid(config)
    untold |= {field: by for field, by in TOLD_BY_ANOTHER.items() if by in untold}
    wrong = [
        field.name
        for field in fields(config)
        if field.name not in {"vocab_size", *untold} and not alike(field.name, config, read)
    ]
    assert not wrong, [(name, getattr(config, name), getattr(read, name)) for name in wrong]


def alike(name: str, config: ModelConfig, read: ModelConfig) -> bool:
    """Whether a field means the same in both: some have no meaning in some models, others are computed."""
    expected, found = getattr(config, name), getattr(read, name)
    if name == "ffn_hidden_size" and config.moe_layer_freq == 1 and config.num_moe_experts:
        return found == config.moe_ffn_hidden_size
    if name == "moe_router_group_max" and groups_are_ranked_alike(config):
        return True
    return math.isclose(expected, found, rel_tol=1e-12) if isinstance(expected, float) else expected == found


@pytest.mark.parametrize("key", [*LAYOUTS, ("llama", "bf16")], ids="-".join)
def test_so_they_do_in_other_layouts_and_dtypes(commands: Commands, key: tuple[str, str]) -> None:
    assert commands[key].read == Read()


def test_no_flag_can_be_left_out(commands: Commands) -> None:
    """Of a flag's values at least one is none that Megatron's parser has by itself."""
    missed: dict[str, bool] = {}
    for key, done in commands.items():
        if "without" in key:
            flag, whole = key[3], commands[key[:2]].read
            missed[flag] = missed.get(flag, True) and done.read == whole
    assert missed.keys() >= {"--norm-epsilon", "--qk-layernorm", "--moe-shared-expert-gate", "--window-size"}
    assert not [flag for flag, unnoticed in missed.items() if unnoticed]
