"""--for-bridge's files, and run_config.yaml read in the place of args: right for every model, safe for every file.

That the real Megatron-Bridge takes them is tests/megatron/test_megatron_bridge.py.
"""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.mcore.agreement import STRUCTURE
from ckptbridge.converters.mcore.megatron_folder import OPTIMIZER_STATES
from ckptbridge.converters.mcore.run_config import args_of_run_config
from ckptbridge.converters.model import decoder_tensors, open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.reshard import plan_reshard
from ckptbridge.converters.training_checkpoint import save_training_checkpoint
from tests.conftest import TinyFolders
from tests.tiny import TINY

ITERATION = "iter_0000000"


def written(hf: Path, target: Path, **options: Any) -> Path:
    execute(plan_conversion(open_model(hf), target, "torch_dist", ConvertOptions(for_bridge=True, **options)))
    return target


@pytest.fixture
def without_args(tiny_folder: TinyFolders, tmp_path: Path) -> Path:
    """What Bridge saves: an iteration without args, its model described in run_config.yaml."""
    root = written(tiny_folder("qwen2"), tmp_path / "bridge", target_mcore=(0, 16))
    shutil.rmtree(root / "hf")
    common = torch.load(root / ITERATION / "common.pt", weights_only=False)
    del common["args"], common["ckptbridge"]
    torch.save(common, root / ITERATION / "common.pt")
    return root


def change(root: Path, **model: Any) -> None:
    file = root / ITERATION / "run_config.yaml"
    run = yaml.safe_load(file.read_text())
    run["model"] |= model
    file.write_text(yaml.safe_dump(run))


@pytest.mark.parametrize("name", TINY)
def test_run_config_tells_of_the_model_what_its_config_json_does(
    tiny_folder: TinyFolders, tmp_path: Path, name: str
) -> None:
    root = written(tiny_folder(name), tmp_path / "bridge", target_mcore=(0, 16))
    shutil.rmtree(root / "hf")
    common = torch.load(root / ITERATION / "common.pt", weights_only=False)
    del common["args"], common["ckptbridge"]
    torch.save(common, root / ITERATION / "common.pt")
    found, expected = open_model(root), open_model(tiny_folder(name))
    assert found.saved is not None
    assert found.saved.args is None
    assert found.family == expected.family
    fields = (*STRUCTURE, "vocab_size", "max_position_embeddings", "rope_scaling", "moe_layer_freq", "init_method_std")
    assert {f: getattr(found.config, f) for f in fields} == {f: getattr(expected.config, f) for f in fields}
    assert not [k for k, t in found.tensors.items() if not t.read().equal(expected.tensors[k].read())]


def test_the_step_is_the_first_and_the_tracker_the_last_file(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = open_model(tiny_folder("llama"))
    plan = plan_conversion(source, tmp_path / "bridge", "torch_dist", ConvertOptions(for_bridge=True))
    names = [name for name, _ in plan.small]
    assert names[-1] == "latest_checkpointed_iteration.txt"
    assert {f"{ITERATION}/run_config.yaml", f"{ITERATION}/train_state.pt", "latest_train_state.pt"} <= set(names)
    assert any("--finetune" in note for note in plan.notes)
    execute(plan)
    states = [torch.load(tmp_path / "bridge" / n) for n in (f"{ITERATION}/train_state.pt", "latest_train_state.pt")]
    assert states[0] == states[1]
    assert states[0]["step"].dtype == torch.int64
    assert not any(value.item() for value in states[0].values())
    assert open_model(tmp_path / "bridge").iteration == 0


def test_the_layout_is_told(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    layout = ParallelLayout(tp=2, pp=2, ep=4, etp=1, first_stage_layers=1)
    root = written(tiny_folder("mixtral"), tmp_path / "bridge", layout=layout, dtype=torch.bfloat16)
    model = yaml.safe_load((root / ITERATION / "run_config.yaml").read_text())["model"]
    told = {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": None,
        "expert_model_parallel_size": 4,
        "expert_tensor_parallel_size": 1,
        "num_layers_in_first_pipeline_stage": 1,
        "num_layers_in_last_pipeline_stage": None,
        "sequence_parallel": True,
        "bf16": True,
        "params_dtype": {"_target_": "torch.bfloat16", "_call_": False},
    }
    assert {name: model[name] for name in told} == told


def test_an_iteration_is_resharded_for_bridge(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = open_model(written(tiny_folder("llama"), tmp_path / "first"))
    plan = plan_reshard(replace(source, iteration=12), tmp_path / "x", "torch_dist", ConvertOptions(for_bridge=True))
    names = dict(plan.small)
    assert "iter_0000012/run_config.yaml" in names
    assert torch.load(io.BytesIO(names["latest_train_state.pt"]))["step"] == 12
    assert names["latest_checkpointed_iteration.txt"] == b"12"


def test_an_optimizer_is_not_for_bridge(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    model = open_model(tiny_folder("llama"))
    weights = {name: tensor.read() for name, tensor in decoder_tensors(model.tensors, model.config).items()}
    states = dict.fromkeys(OPTIMIZER_STATES, weights)
    run = {"model": model, "iteration": 5, "weights": weights, "optimizer": states, "common": {}}
    save_training_checkpoint(tmp_path / "run", **run)  # type: ignore[arg-type]
    source, options = open_model(tmp_path / "run"), ConvertOptions(for_bridge=True)
    with pytest.raises(NotSupportedError, match=r"--for-bridge gives Megatron-Bridge weights alone.*--no-optimizer"):
        plan_reshard(source, tmp_path / "x", "torch_dist", options)
    plan = plan_reshard(source, tmp_path / "x", "torch_dist", options, optimizer="none")
    assert "iter_0000005/run_config.yaml" in dict(plan.small)


def test_only_torch_dist_is_for_bridge(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="--for-bridge: Megatron-Bridge reads torch_dist"):
        plan_conversion(open_model(tiny_folder("llama")), tmp_path / "x", "torch", ConvertOptions(for_bridge=True))


def test_without_both_it_asks_for_a_config(without_args: Path, tiny_folder: TinyFolders) -> None:
    (without_args / ITERATION / "run_config.yaml").unlink()
    with pytest.raises(BadInputError, match=r"holds no args that describe the model; give its config\.json"):
        open_model(without_args)
    assert open_model(without_args, hf_config=tiny_folder("qwen2")).family.name == "qwen2"


def test_a_config_that_contradicts_it_is_refused(without_args: Path, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    config = json.loads((tiny_folder("qwen2") / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] *= 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInputError, match="rotary_base"):
        open_model(without_args, hf_config=tmp_path / "config.json")


def test_a_provider_of_unknown_code_needs_a_config(without_args: Path, tiny_folder: TinyFolders) -> None:
    change(without_args, _target_="megatron.bridge.models.gemma.gemma2_provider.Gemma2ModelProvider")
    with pytest.raises(NotSupportedError, match=r"Gemma2ModelProvider.*--hf-config"):
        open_model(without_args)
    assert open_model(without_args, hf_config=tiny_folder("qwen2")).family.name == "qwen2"


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("normalization", "LayerNorm", "normalization"),
        ("position_embedding_type", "learned_absolute", "position_embedding_type"),
        ("multi_latent_attention", True, "multi_latent_attention"),
        ("qk_l2_norm", True, "qk_l2_norm"),
        ("activation_func", {"_target_": "torch.nn.functional.gelu", "_call_": False}, "gated_linear_unit"),
        ("gated_linear_unit", False, "gated_linear_unit"),
        ("mtp_num_layers", 1, "mtp_num_layers"),
    ],
)
def test_another_computation_is_refused_by_name(without_args: Path, field: str, value: Any, told: str) -> None:
    change(without_args, **{field: value})
    with pytest.raises(BadInputError, match=told):
        open_model(without_args)


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ("normalization", "normalization"),
        ("position_embedding_type", "position_embedding_type"),
        ("add_bias_linear", "linear_proj.bias"),
    ],
)
def test_what_is_absent_is_what_bridge_takes_for_it(without_args: Path, field: str, told: str) -> None:
    file = without_args / ITERATION / "run_config.yaml"
    run = yaml.safe_load(file.read_text())
    del run["model"][field]
    file.write_text(yaml.safe_dump(run))
    with pytest.raises(BadInputError, match=told):
        open_model(without_args)


@pytest.mark.parametrize("field", ["num_layers", "hidden_size", "num_attention_heads"])
@pytest.mark.parametrize("value", [None, "four", -1, [], 10**400, float("nan"), {"_target_": "os.system"}], ids=str)
def test_a_size_that_is_none_is_refused_by_name(without_args: Path, field: str, value: Any) -> None:
    change(without_args, **{field: value})
    with pytest.raises(BadInputError, match=field):
        open_model(without_args)


LAUGHS = "a: &a [x, x]\n" + "\n".join(f"{c}: &{c} [*{p}, *{p}]" for p, c in zip("abcdefgh", "bcdefghi", strict=True))
HOSTILE = {
    "a call": ("model: !!python/object/apply:os.system ['touch HIT']", NotSupportedError, "it may stand for code"),
    "a class": ("model: {num_layers: !!python/name:os.system ''}", NotSupportedError, "it may stand for code"),
    "a local tag": ("model: !thing {}", NotSupportedError, "it may stand for code"),
    "billions of laughs": (LAUGHS, BadInputError, "holds an alias"),
    "depth": ("model: " + "[" * 100_000, BadInputError, "is nested deeper|is no YAML"),
    "a number of half a million digits": ("x: 1" + ":1" * 250_000, BadInputError, "a value of 500001 characters"),
    "length": ("x: 1\n" * 300_000, BadInputError, "bytes"),
    "no YAML": ("model: [}", BadInputError, "is no YAML"),
    "no text": ("\x00\x01", BadInputError, "is no YAML"),
    "nothing": ("", BadInputError, "has no section 'model'"),
    "a list": ("- model", BadInputError, "has no section 'model'"),
    "a word for a model": ("model: llama", BadInputError, "has no section 'model'"),
    "two documents": ("model: {}\n---\nmodel: {}", BadInputError, "is no YAML"),
    "an unhashable key": ("model: {[a]: 1}", BadInputError, "is no YAML"),
    "a number out of range": ("model: {x: 2026-99-99}", BadInputError, "is no YAML"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    text, error, told = HOSTILE[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run_config.yaml").write_text(text)
    with pytest.raises(error, match=told) as raised:
        args_of_run_config(tmp_path)
    assert "run_config.yaml" in str(raised.value)
    assert len(str(raised.value)) < 1000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run_config.yaml"]


def test_bytes_that_are_no_utf_8_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run_config.yaml").write_bytes(b"model: \xff\xfe")
    with pytest.raises(BadInputError, match="is no YAML"):
        args_of_run_config(tmp_path)
