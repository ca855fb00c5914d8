"""The config that is planned with is that of the model a run would train, and nothing is run or written for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptbridge.converters.convert import plan_conversion
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.hf_folder import INDEX
from ckptbridge.converters.model import open_model
from ckptbridge.trainer.planned_source import planned_config
from ckptbridge.trainer.recipe import ModelSection
from ckptbridge.trainer.source import open_source
from ckptbridge.trainer.upcycle_recipe import UpcycleSection
from tests.conftest import TinyFolders
from tests.converters.hub_runs import HUB_ID, run
from tests.converters.hub_server import HubServer
from tests.trainer.text import save_tokenizer

MIXTURES: dict[str, dict[str, Any]] = {
    "copies": {"num_experts": 4, "topk": 2},
    "groups": {"num_experts": 8, "topk": 4, "granularity": 4, "router": "sigmoid", "router_groups": True},
    "shared": {"num_experts": 4, "topk": 2, "granularity": 2, "shared": "partition", "to": "qwen2_moe", "layers": "1:"},
    "cmoe": {"num_experts": 6, "topk": 3, "method": "cmoe", "calibrate": "TEXT"},
    "clustered": {"num_experts": 4, "topk": 2, "method": "split", "split": "clustering", "calibrate": "TEXT"},
    "distilled": {"num_experts": 4, "topk": 2, "method": "split", "distill": {"tokens": 32, "batch": 16}},
    "another": {"num_experts": 2, "method": "branch-train-mix", "others": ["SOURCE"]},
}
CHANGED: dict[str, dict[str, Any]] = {
    "larger": {"num_experts": 16, "method": "expert-upcycling", "router_noise": 0.01, "allow_inexact": True},
    "pruned": {"num_experts": 4, "method": "prune", "calibrate": "TEXT"},
}


def section_of(values: dict[str, Any], source: Path, text: Path) -> UpcycleSection:
    values = {key: str(text) if value == "TEXT" else value for key, value in values.items()}
    if "others" in values:
        values["others"] = [str(source)]
    return UpcycleSection(**values)


@pytest.mark.parametrize("kind", [*MIXTURES, *CHANGED])
def test_it_is_the_config_of_the_mixture_that_is_trained(
    kind: str, tiny_folder: TinyFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_folder("qwen2_moe" if kind in CHANGED else "llama"), source)
    save_tokenizer(source)
    text = tmp_path / "text.txt"
    text.write_text("some words that are counted " * 40)
    options = ModelSection(init_from=str(source), upcycle=section_of((MIXTURES | CHANGED)[kind], source, text))

    with monkeypatch.context() as patched:
        runs = list[str]()
        patched.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *_, **__: runs.append("attention"))
        planned = planned_config(options)
        assert not runs
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "text.txt"]

    assert planned == open_source(options, tmp_path / "work").config
    assert planned != open_model(source).config


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "deepseek_v3_saved", "gemma"])
def test_it_is_the_config_of_a_model_of_either_side(name: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    folder = tiny_folder(name)
    execute(plan_conversion(open_model(folder), tmp_path / "megatron", "torch_dist"))
    for path in (folder, tmp_path / "megatron"):
        options = ModelSection(init_from=str(path))
        assert planned_config(options) == open_source(options, tmp_path / "work").config


def test_a_mixture_that_cannot_be_is_refused(tiny_folder: TinyFolders) -> None:
    for values, said in (
        ({"num_experts": 4, "topk": 5}, "topk 5 exceeds num_experts 4"),
        ({"num_experts": 3, "method": "branch-train-mix"}, "two models or more"),
    ):
        with pytest.raises(BadInputError, match=said):
            planned_config(ModelSection(init_from=str(tiny_folder("llama")), upcycle=UpcycleSection(**values)))


def recipe_for_hub(tmp_path: Path) -> Path:
    values = {
        "run_folder": str(tmp_path / "run"),
        "model": {"init_from": HUB_ID},
        "data": {"text": ["nowhere"]},
        "schedule": {"total_steps": 1},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize("weights", ["shards", "one file", "pickles", "one pickle"])
def test_of_a_hub_id_no_weights_are_fetched(weights: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("qwen2_moe"), folder)
    save_tokenizer(folder)
    expected = {"config.json", INDEX}
    if weights != "shards":
        shards = sorted(folder.glob("*.safetensors"))
        tensors = {k: v for shard in shards for k, v in _load(shard).items()}
        for path in (*shards, folder / INDEX):
            path.unlink()
        expected = _save(weights, tensors, folder)
    recipe = recipe_for_hub(tmp_path)
    local = run_plan(HubServer({HUB_ID: folder}), tmp_path, recipe, "--set", f"model.init_from={folder}")
    hub = HubServer({HUB_ID: folder})
    assert run_plan(hub, tmp_path, recipe) == local
    fetched = {name for name, nbytes in hub.sent.items() if nbytes} - {"name", "agent-harnesses"}
    assert fetched == expected
    assert hub.sent["model.safetensors"] <= 1 << 16
    assert not (tmp_path / "run").exists()


def run_plan(hub: HubServer, tmp_path: Path, *words: object) -> dict[str, Any]:
    with hub:
        done = run(hub, tmp_path, "train", *words, "--plan", "--json")
    assert done.code == 0, done.stderr
    return json.loads(done.stdout)


def _load(shard: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(shard)


def _save(weights: str, tensors: dict[str, torch.Tensor], folder: Path) -> set[str]:
    """Write the weights in another form. Returns the files of which a plan may fetch something."""
    from safetensors.torch import save_file

    if weights == "one file":
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return {"config.json", "model.safetensors"}
    name = "pytorch_model.bin" if weights == "one pickle" else "pytorch_model-00001-of-00001.bin"
    torch.save(tensors, folder / name)
    if weights == "one pickle":
        return {"config.json"}
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return {"config.json", "pytorch_model.bin.index.json"}
