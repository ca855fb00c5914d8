"""Every kind of bad input is refused with a message that names its place, before any output exists."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.execute import execute, partial_folder
from ckptbridge.converters.model import open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from tests.conftest import TinyFolders
from tests.converters.hostile import HF, Bad, edit_json, edit_tensors
from tests.converters.hostile_megatron import LATE, TORCH_DIST

Made = Callable[[str], Path]


@pytest.fixture(scope="module")
def torch_dist_folder(tiny_folder: TinyFolders, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`torch_dist_folder(name)` is TINY[name] as a Megatron checkpoint. Copy it before breaking it."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            target = tmp_path_factory.mktemp("good") / name
            execute(plan_conversion(open_model(tiny_folder(name)), target, "torch_dist"))
            made[name] = target
        return made[name]

    return folder


def spoiled(bad: Bad, good: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    shutil.copytree(good, folder)
    bad.spoil(folder)
    return folder


def assert_nothing_written(target: Path) -> None:
    assert not target.exists()
    assert not partial_folder(target).exists()


def assert_refused(folder: Path, tmp_path: Path, words: tuple[str, ...], to: str) -> None:
    """Opening or planning refuses in these words, and nothing has been written."""
    target = tmp_path / "target"
    with pytest.raises(BadInputError) as refused:
        plan_conversion(open_model(folder), target, to)  # type: ignore[arg-type]
    assert refused.value.exit_code == 3
    for word in words:
        assert word in str(refused.value), f"{word!r} is not in: {refused.value}"
    assert_nothing_written(target)


@pytest.mark.parametrize("name", HF)
def test_a_bad_hugging_face_folder_is_refused(name: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    bad = HF[name]
    assert_refused(spoiled(bad, tiny_folder(bad.source), tmp_path), tmp_path, bad.words, "torch_dist")


@pytest.mark.parametrize("name", TORCH_DIST)
def test_a_bad_megatron_folder_is_refused(name: str, torch_dist_folder: Made, tmp_path: Path) -> None:
    bad = TORCH_DIST[name]
    assert_refused(spoiled(bad, torch_dist_folder(bad.source), tmp_path), tmp_path, bad.words, "hf")


@pytest.mark.parametrize("name", LATE)
def test_damage_that_no_header_shows_is_refused_when_it_is_read(
    name: str, torch_dist_folder: Made, tmp_path: Path
) -> None:
    bad, target = LATE[name], tmp_path / "target"
    folder = spoiled(bad, torch_dist_folder(bad.source), tmp_path)
    with pytest.raises(BadInputError) as refused:
        execute(plan_conversion(open_model(folder), target, "hf"))
    for word in bad.words:
        assert word in str(refused.value), f"{word!r} is not in: {refused.value}"
    assert not target.exists()


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3_moe", "llama_tied", "llama_rope_scaled", "mixtral"])
def test_the_unspoiled_sources_are_good(name: str, torch_dist_folder: Made, tiny_folder: TinyFolders) -> None:
    """Otherwise the refusals above would prove nothing."""
    plan_conversion(open_model(tiny_folder(name)), Path("unused"), "torch_dist")
    plan_conversion(open_model(torch_dist_folder(name)), Path("unused"), "hf")


def test_a_source_truncated_after_planning_is_refused(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    folder, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(tiny_folder("llama"), folder)
    plan = plan_conversion(open_model(folder), target, "torch_dist")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BadInputError, match=r"model\.safetensors.*truncated"):
        execute(plan)
    assert not target.exists()


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("num_hidden_layers", 3, "num_layers"),
        ("num_attention_heads", 4, "num_attention_heads"),
        ("rms_norm_eps", 1e-6, "layernorm_epsilon"),
        ("tie_word_embeddings", True, "share_embeddings_and_output_weights"),
        ("vocab_size", 100, "vocab"),
        ("head_dim", 16, "kv_channels"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 7.0}, "rotary_base"),
        (
            "rope_parameters",
            {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "rope_scaling",
        ),
    ],
)
def test_a_given_config_that_contradicts_the_args_is_refused(
    field: str, value: object, word: str, torch_dist_folder: Made, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    given = tmp_path / "config.json"
    shutil.copy(tiny_folder("llama") / "config.json", given)
    edit_json(given, **{field: value})
    with pytest.raises(BadInputError) as refused:
        open_model(torch_dist_folder("llama"), hf_config=given)
    assert word in str(refused.value)
    assert str(given) in str(refused.value)


def test_a_given_config_of_another_family_is_refused(
    torch_dist_folder: Made, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    for given, word in (("qwen2", "add_qkv_bias"), ("qwen3", "qk_layernorm"), ("mixtral", "num_moe_experts")):
        with pytest.raises(BadInputError, match=word):
            open_model(torch_dist_folder("llama"), hf_config=tiny_folder(given))
    with pytest.raises(BadInputError, match="nowhere"):
        open_model(torch_dist_folder("llama"), hf_config=tmp_path / "nowhere")


def test_folders_that_hold_no_checkpoint_are_refused(tmp_path: Path) -> None:
    for name, words in {
        "absent": ("absent", "no such folder"),
        "file": ("file", "a file"),
        "empty": ("empty", "no checkpoint"),
        "begun.partial": ("begun.partial", "--resume"),
        "legacy": ("mp_rank_00/model_optim_rng.pt", "missing"),
        "tracked": ("iter_0000007", "missing"),
    }.items():
        path = tmp_path / name
        if name == "file":
            path.write_text("hello")
        elif name != "absent":
            path.mkdir()
        if name == "legacy":
            (path / "release" / "mp_rank_00").mkdir(parents=True)
            (path / "latest_checkpointed_iteration.txt").write_text("release")
        if name == "tracked":
            (path / "latest_checkpointed_iteration.txt").write_text("7\n")
        with pytest.raises(BadInputError) as refused:
            open_model(path)
        for word in words:
            assert word in str(refused.value), f"{word!r} is not in: {refused.value}"


def test_layouts_and_sizes_that_cannot_be_are_refused_before_output(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    target = tmp_path / "target"
    for name, layout in (("llama", {"tp": 3}), ("llama", {"ep": 2}), ("mixtral", {"ep": 3}), ("qwen2_moe", {"pp": 3})):
        options = ConvertOptions(layout=ParallelLayout(**layout))
        with pytest.raises(BadInputError):
            plan_conversion(open_model(tiny_folder(name)), target, "torch_dist", options)
    for limit in (0, -1):
        with pytest.raises(BadInputError, match="max_shard_size"):
            plan_conversion(open_model(tiny_folder("llama")), target, "hf", ConvertOptions(max_shard_size=limit))
        with pytest.raises(BadInputError, match="max_file_size"):
            plan_conversion(open_model(tiny_folder("llama")), target, "torch_dist", ConvertOptions(max_file_size=limit))
    assert_nothing_written(target)


def test_a_copy_of_the_tied_head_is_dropped_and_said(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    shutil.copytree(tiny_folder("llama_tied"), folder)
    edit_tensors(folder, lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"].clone()}))
    plan = plan_conversion(open_model(folder), tmp_path / "target", "torch_dist")
    assert any("lm_head.weight" in note for note in plan.notes)
    execute(plan)
    assert "output_layer.weight" not in open_model(tmp_path / "target").tensors


def test_rotary_frequencies_of_old_files_are_left_out(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    shutil.copytree(tiny_folder("llama"), folder)
    names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(4)]
    edit_tensors(folder, lambda held: held.update({name: torch.ones(4) for name in names}))
    execute(plan_conversion(open_model(folder), tmp_path / "target", "torch_dist"))
    edit_tensors(folder, lambda held: held.update({"model.layers.9.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    with pytest.raises(BadInputError, match=r"layers\.9\."):
        open_model(folder)
