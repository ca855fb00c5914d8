"""What the real Megatron-FSDP saves as fsdp_dtensor, under several layouts, becomes the Hugging Face model it was."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.execute import execute
from ckptbridge.converters.mcore.agreement import STRUCTURE
from ckptbridge.converters.model import open_model
from tests.megatron.cases import megatron_config, to_megatron
from tests.megatron.launch import Layout, check_fetched, environment
from tests.tiny import save_tiny

pytestmark = [pytest.mark.mcore, pytest.mark.xdist_group("megatron")]

CASES = (
    ("llama", Layout()),
    ("llama_tied", Layout(tp=4)),
    ("mixtral", Layout(ep=2)),
    ("qwen2_moe", Layout(tp=2, ep=2)),
    ("qwen3_moe_dense_first", Layout(tp=2, ep=2, etp=2)),
)
TORCH = ("llama", "mixtral")
"""Sharded by torch's fully_shard in Megatron's wrapper instead, which knows no tensor or expert parallelism here."""
Saved = Callable[[str, Layout | None], tuple[Path, Path]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """`saved(model, layout)` are the bf16 Hugging Face folder and what Megatron-FSDP saved of its weights."""
    check_fetched()
    root = tmp_path_factory.mktemp("fsdp")
    cases = []
    for name in dict.fromkeys(name for name, _ in CASES):
        save_tiny(name, root / name, torch.bfloat16)
        to_megatron(root / name, root / f"{name}-torch_dist", ConvertOptions())
    for name, layout in CASES:
        cases.append(
            {
                "weights": str(root / f"{name}-torch_dist" / "release"),
                "folder": str(root / f"{name}-{layout}"),
                "layout": asdict(layout),
                "config": megatron_config(root / name),
                "torch": False,
            }
        )
    for name in TORCH:
        layout = {"layout": asdict(Layout()), "config": megatron_config(root / name), "torch": True}
        folders = {"weights": str(root / f"{name}-torch_dist" / "release"), "folder": str(root / f"{name}-torch")}
        cases.append({**layout, **folders})
    job = root / "job.json"
    job.write_text(json.dumps({"cases": cases, "store": str(root / "store")}))
    command = [sys.executable, str(Path(__file__).with_name("fsdp_worker.py")), str(job)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-8000:]
    return lambda name, layout: (root / name, root / f"{name}-{layout or 'torch'}")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(("name", "layout"), CASES, ids=str)
def test_its_weights_come_back_bit_for_bit(saved: Saved, tmp_path: Path, name: str, layout: Layout) -> None:
    hf, folder = saved(name, layout)
    source = open_model(folder, hf_config=hf)
    assert (source.format, source.iteration) == ("fsdp_dtensor", 7)
    assert source.dtype == torch.float32  # Megatron-FSDP saves the optimizer's main weights
    execute(plan_conversion(source, tmp_path / "hf", "hf", ConvertOptions(dtype=torch.bfloat16)))
    expected, found = tensors_of(hf), tensors_of(tmp_path / "hf")
    assert found.keys() == expected.keys()
    assert not [key for key in expected if not torch.equal(found[key], expected[key])]


@pytest.mark.parametrize("name", TORCH)
def test_torch_dcp_comes_back_bit_for_bit(saved: Saved, tmp_path: Path, name: str) -> None:
    hf, folder = saved(name, None)
    source = open_model(folder)
    assert source.dtype == torch.bfloat16  # the model's own: torch's FSDP keeps no main weights in it
    execute(plan_conversion(open_model(folder, hf_config=hf), tmp_path / "hf", "hf"))
    expected, found = tensors_of(hf), tensors_of(tmp_path / "hf")
    assert found.keys() == expected.keys()
    assert not [key for key in expected if not torch.equal(found[key], expected[key])]


def test_swapped_halves_show(saved: Saved, tmp_path: Path) -> None:
    """What a reader that takes `_w` for up_proj would make of it differs in just those tensors."""
    hf, folder = saved("mixtral", Layout(ep=2))
    shutil.copytree(folder, tmp_path / "swapped")
    file = tmp_path / "swapped" / "iter_0000007" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    one, other = (f"model.module.decoder.layers.2.mlp.experts.local_experts.3.linear_fc1.weight_{h}" for h in "wv")
    renamed = {one: other, other: one}
    metadata.storage_data = {
        replace(index, fqn=renamed.get(index.fqn, index.fqn)): info for index, info in metadata.storage_data.items()
    }
    tables = metadata.state_dict_metadata
    tables[one], tables[other] = tables[other], tables[one]
    file.write_bytes(pickle.dumps(metadata))
    source = open_model(tmp_path / "swapped", hf_config=hf)
    execute(plan_conversion(source, tmp_path / "hf", "hf", ConvertOptions(dtype=torch.bfloat16)))
    expected, found = tensors_of(hf), tensors_of(tmp_path / "hf")
    wrong = sorted(key for key in expected if not torch.equal(found[key], expected[key]))
    assert wrong == [f"model.layers.2.block_sparse_moe.experts.3.{matrix}.weight" for matrix in ("w1", "w3")]


@pytest.mark.parametrize(("name", "layout"), CASES, ids=str)
def test_its_arguments_describe_the_model(saved: Saved, name: str, layout: Layout) -> None:
    """Without a config.json: what the checkpoint holds is enough."""
    hf, folder = saved(name, layout)
    source, expected = open_model(folder), open_model(hf)
    assert source.family == expected.family
    assert {f: getattr(source.config, f) for f in STRUCTURE} == {f: getattr(expected.config, f) for f in STRUCTURE}
    assert source.saved is not None
    assert source.saved.common["opt_param_scheduler"] == {"max_lr": 1e-3, "num_steps": 7}
    assert source.saved.common["checkpoint_version"] == 3.0


@pytest.mark.parametrize(("name", "layout"), CASES, ids=str)
def test_its_moments_belong_to_their_weights(saved: Saved, name: str, layout: Layout) -> None:
    """The gradient was the weight itself, so the first moment is a tenth of it."""
    hf, folder = saved(name, layout)
    source = open_model(folder, hf_config=hf)
    assert source.saved is not None
    assert source.saved.states() == ("param", "exp_avg", "exp_avg_sq")
    moments = source.saved.parameters(source.family, source.config, "exp_avg")
    weights = source.saved.parameters(source.family, source.config, "param")
    assert moments.keys() == weights.keys() == source.tensors.keys()
    for key, moment in moments.items():
        torch.testing.assert_close(moment.read(), 0.1 * weights[key].read(), msg=key)
