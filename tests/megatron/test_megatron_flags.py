"""What `launch megatron` prints, read by Megatron-LM's own parser, gives the TransformerConfig of the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.execute import execute
from ckptbridge.converters.mcore.flags import Flag
from ckptbridge.converters.mcore.notes import unsaid
from ckptbridge.converters.model import Model, open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from tests.conftest import TinyFolders
from tests.megatron.flags_launch import Command, Read, command_for, command_without_arguments, read_by_megatron
from tests.megatron.launch import check_fetched
from tests.tiny import EVERY

pytestmark = pytest.mark.xdist_group("megatron")

COMPUTED = [name for name, model in EVERY.items() if not model.not_in_megatron]
LAYOUT = ParallelLayout(tp=2, pp=2)
LAYOUTS = {
    ("llama", "tp4"): ParallelLayout(tp=4),
    ("llama", "vpp"): ParallelLayout(pp=2, vpp=2),
    ("llama", "uneven"): ParallelLayout(pp=2, first_stage_layers=1),
    ("mixtral", "ep"): ParallelLayout(tp=2, ep=2, etp=1),
    ("qwen3_moe_dense_first", "uneven"): ParallelLayout(tp=2, pp=3, ep=2, first_stage_layers=2, last_stage_layers=1),
}
SILENT = {
    "rope_scaling": {"gpt.rope_scaling_factor", "original_max_position_embeddings"},
    "activation_func": {"activation_func", "gated_linear_unit"},
}
"""What Megatron-LM makes otherwise of a field that it cannot be told, where the model is one that it runs."""
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
    """By (model, "saved"), (model, "told all"), (model, layout), ("llama", "bf16"), and with "without" and a flag."""
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
    made |= {(name, "told all"): command_without_arguments(model, layout_of(name)) for name, model in models.items()}
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
    untold = unsaid(open_model(tiny_folder(name)).config)
    assert read.differences.keys() <= set().union(*(SILENT[field] for field in untold)), read.differences
    assert bool(read.differences) == bool(untold), untold


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
