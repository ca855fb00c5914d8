"""The real Megatron-Bridge 0.6.2 loads what --for-bridge writes, exports it bit for bit, and what it saves is read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from tests.conftest import TinyFolders
from tests.fetch_megatron import BRIDGE, NEWEST, OMEGACONF
from tests.megatron.cases import layout_for
from tests.megatron.launch import check_fetched, environment
from tests.tiny import TINY, reference_logits, token_ids

pytestmark = [pytest.mark.mcore, pytest.mark.xdist_group("megatron")]

TOLERANCE = 1e-5
FAULT = 1e-3
EXPORTED = ("llama_tied", "llama_rope_scaled", "mistral", "qwen2", "qwen3", "qwen3_moe")
UNKNOWN = ("mixtral", "qwen2_moe")
"""Bridge has no mapping for these to Hugging Face; it trains and loads them as Megatron's own."""
UNLIKE_LAYERS = ("qwen3_moe_dense_first",)
"""Bridge knows the architecture, but maps no dense layers of it."""
LAID_OUT = "qwen3_moe laid out"
Bridged = Callable[[str], tuple[dict[str, Any], dict[str, Any]]]


@pytest.fixture(scope="module")
def bridged(tiny_folder: TinyFolders, tmp_path_factory: pytest.TempPathFactory) -> Bridged:
    """`bridged(name)` are a case and its result."""
    for release in (NEWEST, BRIDGE, OMEGACONF):
        check_fetched(release.folder)
    root = tmp_path_factory.mktemp("bridge")
    cases: dict[str, dict[str, Any]] = {}
    for name in (*EXPORTED, *UNKNOWN, *UNLIKE_LAYERS):
        cases[name] = _case(tiny_folder(name), root, name, layout_for(name))
    cases[LAID_OUT] = _case(tiny_folder("qwen3_moe"), root, LAID_OUT, ParallelLayout(tp=2, pp=2, ep=2))
    cases["fault"] = _case(tiny_folder("qwen2"), root, "fault", ParallelLayout())
    file = Path(cases["fault"]["folder"]) / "iter_0000000" / "run_config.yaml"
    run_config = yaml.safe_load(file.read_text())
    run_config["model"]["rotary_base"] *= 2
    file.write_text(yaml.safe_dump(run_config))
    (root / "job.json").write_text(json.dumps(list(cases.values())))
    command = [sys.executable, str(Path(__file__).with_name("bridge_worker.py")), str(root / "job.json")]
    variables = environment() | {"PYTHONPATH": ":".join(str(release.folder) for release in (NEWEST, BRIDGE, OMEGACONF))}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-8000:]
    return lambda name: (cases[name], json.loads(Path(cases[name]["out"]).read_text()))


def _case(hf: Path, root: Path, name: str, layout: ParallelLayout) -> dict[str, Any]:
    folder, expected = root / name, root / f"{name} expected.pt"
    execute(plan_conversion(open_model(hf), folder, "torch_dist", ConvertOptions(layout=layout, for_bridge=True)))
    torch.save(reference_logits(hf, token_ids()), expected)
    return {
        "hf": str(hf),
        "folder": str(folder),
        "export": name not in (*UNKNOWN, *UNLIKE_LAYERS),
        "token_ids": token_ids().tolist(),
        "expected": str(expected),
        "saved": str(root / f"{name} saved"),
        "out": str(root / f"{name}.json"),
    }


@pytest.mark.parametrize("name", [*EXPORTED, *UNKNOWN, *UNLIKE_LAYERS, LAID_OUT])
def test_it_computes_what_transformers_does(
    bridged: Bridged, record_property: Callable[[str, object], None], name: str
) -> None:
    _, result = bridged(name)
    record_property("max_abs_diff", result["max_abs_diff"])
    assert result["max_abs_diff"] <= TOLERANCE


def test_a_wrong_run_config_shows(bridged: Bridged) -> None:
    """The args in the checkpoint are right: it is the file that Bridge believes."""
    assert bridged("fault")[1]["max_abs_diff"] > FAULT


@pytest.mark.parametrize("name", [*EXPORTED, LAID_OUT])
def test_it_exports_the_model_bit_for_bit(bridged: Bridged, name: str) -> None:
    _, result = bridged(name)
    assert (result["names"], result["differing"]) == ([], [])


def test_what_it_knows(bridged: Bridged) -> None:
    known = {name: bridged(name)[1]["known"] for name in (*EXPORTED, *UNKNOWN, *UNLIKE_LAYERS)}
    assert known == {name: name not in UNKNOWN for name in known}


@pytest.mark.parametrize("name", EXPORTED)
def test_what_it_saves_is_read_by_its_run_config(
    bridged: Bridged, tmp_path: Path, tiny_folder: TinyFolders, name: str
) -> None:
    saved = Path(bridged(name)[0]["saved"])
    source = open_model(saved)
    assert source.saved is not None
    assert source.saved.args is None  # Bridge keeps no args: it is run_config.yaml that tells
    assert source.family == open_model(tiny_folder(name)).family
    execute(plan_conversion(source, tmp_path / "hf", "hf"))
    expected = {k: v for f in tiny_folder(name).glob("*.safetensors") for k, v in load_file(f).items()}
    found = {k: v for f in (tmp_path / "hf").glob("*.safetensors") for k, v in load_file(f).items()}
    assert found.keys() == expected.keys()
    assert not [key for key in expected if not torch.equal(found[key], expected[key])]
    logits = reference_logits(tmp_path / "hf", token_ids())
    assert (logits - reference_logits(tiny_folder(name), token_ids())).abs().max().item() == 0


def test_the_models_are_all_accounted_for() -> None:
    families = {TINY[name].hf_class for name in (*EXPORTED, *UNKNOWN, *UNLIKE_LAYERS)}
    assert families == {model.hf_class for model in TINY.values()}
