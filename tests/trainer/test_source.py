"""What a recipe's model section names, and which of its keys are refused because they would have no effect."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptbridge.converters.convert import plan_conversion
from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import open_model
from ckptbridge.trainer.planned_source import planned_config
from ckptbridge.trainer.recipe import ModelSection
from ckptbridge.trainer.source import open_source
from tests.conftest import TinyFolders


@pytest.fixture
def megatron(tiny_folder: TinyFolders, tmp_path: Path) -> Path:
    execute(plan_conversion(open_model(tiny_folder("llama")), tmp_path / "megatron", "torch_dist"))
    return tmp_path / "megatron"


def refusal(section: ModelSection, work: Path) -> str:
    """What is said of a section, by a run and by its plan alike."""
    with pytest.raises(BadInputError) as of_run:
        open_source(section, work)
    with pytest.raises(BadInputError) as of_plan:
        planned_config(section)
    assert str(of_plan.value) == str(of_run.value)
    assert not work.exists()
    return str(of_run.value)


def test_a_folder_has_no_revision(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    folder = tiny_folder("llama")
    said = refusal(ModelSection(init_from=str(folder), revision="v2"), tmp_path / "work")
    assert said.startswith(f"model.revision: 'v2' is a branch, tag or commit of a Hub id, but model.init_from {folder}")
    assert "leave revision out" in said


def test_a_config_for_megatron_alone_is_refused_beside_a_hugging_face_model(
    tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    for name in (str(tiny_folder("llama")), "org/name"):  # and nothing is downloaded for it
        section = ModelSection(init_from=name, hf_config=tmp_path / "nowhere.json")
        said = refusal(section, tmp_path / "work")
        assert said.startswith(f"model.hf_config: {tmp_path / 'nowhere.json'} would not be read")
        assert name in said
        assert "leave hf_config out" in said


def test_it_is_read_beside_a_megatron_one(megatron: Path, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    given = tiny_folder("llama")
    for path in (given, given / "config.json"):
        section = ModelSection(init_from=str(megatron), hf_config=path)
        assert open_source(section, tmp_path / "work").hf_config_file == given / "config.json"
    said = refusal(ModelSection(init_from=str(megatron), hf_config=tmp_path / "nowhere.json"), tmp_path / "work")
    assert said.startswith(f"model.hf_config: {tmp_path / 'nowhere.json'}: there is no such config.json")


@pytest.mark.parametrize(
    ("name", "architecture", "field"),
    [
        ("gemma2", "Gemma2ForCausalLM", "final_logit_softcapping = 2.0"),
        ("phimoe", "PhimoeForCausalLM", "add_output_layer_bias = True"),
    ],
)
def test_what_is_not_trained_is_named_with_the_model(
    name: str, architecture: str, field: str, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    folder = tiny_folder(name)
    with pytest.raises(NotSupportedError):
        open_source(ModelSection(init_from=str(folder)), tmp_path)
    said = refusal(ModelSection(init_from=str(folder)), tmp_path / "work")
    assert said.startswith(f"{folder}: {architecture} cannot be trained: training does not compute {field}")
    assert "let model.init_from name one" in said
