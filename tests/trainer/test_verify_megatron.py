"""`verify` with the real megatron-core as its engine: what passes, what fails with which numbers, what is refused."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ckptbridge.cli import app
from ckptbridge.converters.convert import ConvertOptions
from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.model import open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.rope_scaling import Llama3RopeScaling
from ckptbridge.trainer.megatron.config import transformer_config
from ckptbridge.trainer.megatron.layouts import layout_name, parse_layouts
from ckptbridge.trainer.verify import verify
from tests.conftest import TinyFolders
from tests.megatron.cases import DROPPED, fault_case, layout_for, to_megatron
from tests.megatron.hf_to_megatron import megatron_kwargs
from tests.megatron.launch import MEGATRON, check_fetched
from tests.tiny import TINY

TOKENS = 64
ROUNDING = 1e-6
"""Nats a token: two programs in fp32 differ by 2e-7 at most on these models, the planted fault moves KL by 1e-3."""


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """megatron-core on the path, and temporary files in a folder of this test's own."""
    check_fetched()
    monkeypatch.syspath_prepend(str(MEGATRON))
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def converted(name: str, hf: Path, target: Path) -> Path:
    to_megatron(hf, target, ConvertOptions(layout=layout_for(name)))
    return target


def run(*words: object, pythonpath: str = "") -> subprocess.CompletedProcess[str]:
    """`ckptbridge ...` in a process of its own."""
    environment = os.environ | {"PYTHONPATH": pythonpath, "TERM": "dumb"}
    command = [sys.executable, "-m", "ckptbridge", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.mcore
@pytest.mark.xdist_group("megatron")
@pytest.mark.parametrize(("name", "layouts"), [("mixtral", "tp2,ep2,pp2,tp2ep2"), ("llama", "tp2,pp2")])
def test_a_converted_model_passes_under_every_layout(
    scratch: Path, tiny_folder: TinyFolders, tmp_path: Path, name: str, layouts: str
) -> None:
    hf = tiny_folder(name)
    mcore = converted(name, hf, tmp_path / "mcore")
    report = verify(hf, mcore, tokens=TOKENS, engine="megatron", layouts=parse_layouts(layouts))
    assert report.passed, report
    assert report.engine == "megatron"
    assert report.first_divergence is None
    assert [(row.checkpoint, row.layout) for row in report.layouts] == [("b", name) for name in layouts.split(",")]
    for row in report.layouts:
        assert row.passed
        assert row.loss == pytest.approx(report.loss_a, abs=ROUNDING)
        assert row.max_abs_logit_difference <= 1e-5
        assert row.missing_keys == row.unexpected_keys == ()
    assert report.loss_difference == max(row.loss_difference for row in report.layouts)
    assert not list(scratch.glob("ckptbridge*"))


@pytest.mark.mcore
@pytest.mark.xdist_group("megatron")
def test_swapped_experts_and_a_missing_key_fail_each_in_its_row(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    good = converted("qwen3_moe", tiny_folder("qwen3_moe"), tmp_path / "good")
    without_extra_states(good / "release")
    fault_case("two experts swapped", tiny_folder("qwen3_moe"), tmp_path)
    words = ("--engine", "megatron", "--layouts", "ep2", "--tokens", TOKENS, "--json")
    done = run("verify", good, tmp_path / "megatron", *words, pythonpath=str(MEGATRON))
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert not report["passed"]
    assert report["first_divergence"] == "output_layer"
    of_a, of_b = report["layouts"]
    assert (of_a["checkpoint"], of_a["passed"], of_a["loss_difference"], of_a["kl"]) == ("a", False, 0.0, 0.0)
    assert of_a["missing_keys"] == [DROPPED]
    assert (of_b["checkpoint"], of_b["passed"], of_b["missing_keys"]) == ("b", False, [])
    assert of_b["kl"] > 1e-4
    assert of_b["max_abs_logit_difference"] > 1e-2
    assert of_b["loss"] == report["loss_b"]


def without_extra_states(folder: Path) -> None:
    """Forget the objects that each layer's linear_proj asks for."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for entries, name_of in ((metadata.state_dict_metadata, str), (metadata.storage_data, lambda index: index.fqn)):
        for key in [key for key in entries if name_of(key).startswith(DROPPED)]:
            del entries[key]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.mcore
@pytest.mark.xdist_group("megatron")
def test_a_failing_rank_is_quoted_and_its_log_kept(scratch: Path, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    mcore = converted("llama", tiny_folder("llama"), tmp_path / "mcore")
    file = next((mcore / "release").glob("*.distcp"))
    damaged = file.read_bytes().replace(b"PK", b"KP")  # the sizes are right, the archives are none
    file.write_bytes(damaged)
    with pytest.raises(BadInputError, match=r"failed under pp2: \S+Error: ") as caught:
        verify(mcore, tiny_folder("llama"), tokens=TOKENS, engine="megatron", layouts=[ParallelLayout(pp=2)])
    (log,) = scratch.glob("ckptbridge*")
    assert str(log) in str(caught.value)
    assert "Traceback" in log.read_text()


def test_without_megatron_core_it_says_what_to_install(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    mcore = converted("llama", tiny_folder("llama"), tmp_path / "mcore")
    done = run("verify", tiny_folder("llama"), mcore, "--engine", "megatron", "--layouts", "tp2")
    assert done.returncode == 3
    assert "pip install 'ckptbridge[mcore]'" in done.stderr
    assert "Python 3.12" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_does_not_go_together_is_refused(scratch: Path, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    hf = tiny_folder("llama")
    mcore = converted("llama", hf, tmp_path / "mcore")
    with pytest.raises(BadInputError, match=r"neither .* is a Megatron checkpoint"):
        verify(hf, hf, engine="megatron")
    with pytest.raises(BadInputError, match="layouts need engine megatron"):
        verify(hf, mcore, layouts=[ParallelLayout(tp=2)])
    with pytest.raises(BadInputError, match="tp = 3 does not divide num_attention_heads = 8"):
        verify(hf, mcore, engine="megatron", layouts=[ParallelLayout(), ParallelLayout(tp=3)])
    with pytest.raises(BadInputError, match="has no experts"):
        verify(hf, mcore, engine="megatron", layouts=[ParallelLayout(ep=2)])
    with pytest.raises(NotSupportedError, match="vpp is 2"):
        verify(hf, mcore, engine="megatron", layouts=[ParallelLayout(pp=2, vpp=2)])
    assert not list(scratch.glob("ckptbridge*"))


@pytest.mark.parametrize(
    ("words", "told"),
    [(["--layouts", "tp2"], "need --engine megatron"), (["--engine", "megatron", "--layouts", "tp"], "is no layout")],
)
def test_a_wrong_flag_is_a_usage_error(words: list[str], told: str) -> None:
    result = CliRunner().invoke(app, ["verify", "a", "b", *words], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 2
    assert told in result.output


def test_layouts_are_read_as_megatron_means_them() -> None:
    assert parse_layouts("tp2, EP2,pp2ep2,tp2ep2etp1") == [
        ParallelLayout(tp=2),
        ParallelLayout(ep=2),
        ParallelLayout(pp=2, ep=2),
        ParallelLayout(tp=2, ep=2, etp=1),
    ]
    assert [layout.world_size for layout in parse_layouts("tp1,tp2ep2,tp2ep2etp1,ep2etp2")] == [1, 4, 2, 4]
    for name in ("tp1", "tp2", "pp2ep2", "tp2ep2", "tp2ep2etp1", "tp2pp4ep8etp4"):
        assert [layout_name(layout) for layout in parse_layouts(name)] == [name]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "'' is no layout"),
        ("tp2,", "'' is no layout"),
        ("tp2 ep2", "'tp2 ep2' is no layout"),
        ("tp2,cp2", "'cp2' is no layout"),
        ("2", "such as tp2, pp2ep2"),
        ("ep2ep4", "names a degree twice"),
        ("tp0", "tp is 0"),
    ],
)
def test_what_is_no_layout_is_refused(text: str, told: str) -> None:
    with pytest.raises(BadInputError, match=told):
        parse_layouts(text)


@pytest.mark.parametrize("name", TINY)
def test_megatron_is_told_what_the_hugging_face_config_says(tiny_folder: TinyFolders, name: str) -> None:
    folder = tiny_folder(name)
    told = transformer_config(open_model(folder).config, tp=2)
    expected = megatron_kwargs(json.loads((folder / "config.json").read_text()))
    assert told["gpt"] == expected["gpt"]
    beyond = {key: value for key, value in told["transformer"].items() if key not in expected["transformer"]}
    assert told["transformer"] == expected["transformer"] | beyond
    assert not _says_something(beyond)


def _says_something(beyond: dict[str, Any]) -> dict[str, Any]:
    """What is not TransformerConfig's default; routing in fp32 changes nothing where everything is fp32."""
    return {key: value for key, value in beyond.items() if value and (key, value) not in _DEFAULTS}


_DEFAULTS = (
    *(("moe_router_dtype", "fp32"), ("moe_layer_freq", 1), ("moe_router_score_function", "softmax")),
    *(("softmax_type", "vanilla"), ("activation_func", "silu")),
)


def test_a_model_that_megatron_cannot_be_told_is_refused(tiny_folder: TinyFolders) -> None:
    dense, moe = (open_model(tiny_folder(name)).config for name in ("llama", "mixtral"))
    with pytest.raises(NotSupportedError, match="rope scaling"):
        transformer_config(replace(dense, rope_scaling=Llama3RopeScaling(factor=8.0, high_freq_factor=8.0)))
    with pytest.raises(NotSupportedError, match="moe_router_topk is 1"):
        transformer_config(replace(moe, moe_router_topk=1))
