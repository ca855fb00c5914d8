"""`launch megatron`: what a user sees, pastes, and is refused."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ckptbridge.converters.convert import ConvertOptions, WrittenFormat, plan_conversion
from ckptbridge.converters.execute import execute
from ckptbridge.converters.mcore.command import megatron_command
from ckptbridge.converters.model import open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from tests.conftest import TinyFolders


def launch(*words: object, check: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ckptbridge", "launch", "megatron", *map(str, words)]
    environment = {**os.environ, "COLUMNS": "200", "TERM": "dumb"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == check, done.stdout + done.stderr
    return done


def converted(source: Path, target: Path, layout: ParallelLayout, written: WrittenFormat = "torch_dist") -> Path:
    execute(plan_conversion(open_model(source), target, written, ConvertOptions(layout=layout)))
    return target


def test_lines_paste_into_a_shell_and_json_says_the_same(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    folder = converted(tiny_folder("gpt_oss"), tmp_path / "two words", ParallelLayout(tp=2, etp=1))
    done = launch(folder)
    told = json.loads(launch(folder, "--json").stdout)["arguments"]
    assert shlex.split(done.stdout.replace("\\\n", "")) == told
    script = f"printf '%s\\n' \\\n{done.stdout}"
    assert subprocess.run(["bash", "-c", script], capture_output=True, text=True).stdout.splitlines() == told
    assert all(line.endswith(" \\") for line in done.stdout.splitlines()[:-1])
    assert told[:2] == ["--load", str(folder)]
    assert "--window-attn-skip-freq" in told


def test_the_layout_is_the_saved_one_unless_another_is_named(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    folder = converted(tiny_folder("mixtral"), tmp_path / "mcore", ParallelLayout(tp=2, pp=2, vpp=2, ep=2))
    saved = launch(folder).stdout
    assert "--tensor-model-parallel-size 2" in saved
    assert "--num-virtual-stages-per-pipeline-rank 2" in saved
    assert "--expert-tensor-parallel-size 2" in saved
    other = launch(folder, "--tp", 4, "--pp", 1, "--ep", 4).stdout
    assert "--tensor-model-parallel-size 4" in other
    assert "virtual" not in other
    assert "--expert-tensor-parallel-size 4" in other
    assert "num_query_groups" in launch(folder, "--tp", 8, check=3).stderr


def test_files_that_are_cut_launch_in_their_layout_alone(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    folder = converted(tiny_folder("qwen2"), tmp_path / "legacy", ParallelLayout(tp=2), "torch")
    assert "--ckpt-format torch \\" in launch(folder, "--tp", 2).stdout
    assert "ckptbridge reshard" in launch(folder, "--tp", 4, check=3).stderr


def test_a_model_that_megatron_cannot_be_told_is_noted(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    folder = converted(tiny_folder("llama_rope_scaled"), tmp_path / "mcore", ParallelLayout())
    done = launch(folder)
    assert "rope_scaling" in done.stderr
    assert "rope_scaling" not in done.stdout
    assert "rope_scaling" in json.loads(launch(folder, "--json").stdout)["notes"][0]
    assert not launch(folder, "--quiet").stderr


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_a_hugging_face_folder_is_refused(tiny_folder: TinyFolders, words: tuple[str, ...]) -> None:
    assert "hf2mcore" in launch(tiny_folder("llama"), *words, check=3).stderr


def test_megatron_finds_the_tokenizer_beside_the_weights(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = tmp_path / "hf"
    source.mkdir()
    for file in tiny_folder("llama").iterdir():
        (source / file.name).symlink_to(file)
    (source / "tokenizer.json").write_text("{}")
    folder = converted(source, tmp_path / "mcore", ParallelLayout())
    told = json.loads(launch(folder, "--json").stdout)["arguments"]
    assert (Path(told[told.index("--tokenizer-model") + 1]) / "tokenizer.json").is_file()


def test_a_vocabulary_that_tp_does_not_divide_is_padded_again(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    model = open_model(converted(tiny_folder("llama"), tmp_path / "mcore", ParallelLayout()))
    assert model.saved is not None
    assert model.saved.args is not None
    assert "--padded-vocab-size" not in dict(flag for flag in megatron_command(model, {"tp": 4}) if len(flag) == 2)
    model.saved.args.padded_vocab_size = 250
    assert ("--padded-vocab-size", "512") in megatron_command(model, {"tp": 4})


def test_weights_that_were_trained_are_loaded_without_an_optimizer(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    folder = converted(tiny_folder("llama"), tmp_path / "mcore", ParallelLayout())
    told = megatron_command(open_model(folder), {})
    assert ("--no-load-optim",) not in told
    (folder / "release").rename(folder / "iter_0000007")
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    trained = megatron_command(open_model(folder), {})
    assert set(trained) - set(told) >= {("--no-load-optim",)}
    assert trained[0] == ("--load", str(folder))
