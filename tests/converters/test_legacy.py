"""Legacy checkpoints: there and back bit for bit, and each rank's file held against loops, torch and zipfile."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.mcore.legacy.reader import LegacyFolder
from ckptbridge.converters.model import open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.receipt import RECEIPT_NAME
from ckptbridge.converters.reshard import plan_reshard
from tests.conftest import TinyFolders
from tests.converters.legacy_naive import Ranks, nested, rank_models
from tests.tiny import TINY, save_tiny

MODELS = ("llama", "llama_tied", "qwen2_moe", "mixtral", "qwen3_moe", "qwen3_moe_dense_first")
STAGES: dict[str, dict[str, Any]] = {
    "": {},
    "pp2": {"pp": 2},
    "pp4": {"pp": 4},
    "pp2vpp2": {"pp": 2, "vpp": 2},
    "pp2first1": {"pp": 2, "first_stage_layers": 1},
    "pp2last1": {"pp": 2, "last_stage_layers": 1},
    "pp3ends1": {"pp": 3, "first_stage_layers": 1, "last_stage_layers": 1},
}
DEAL = {
    "": [[[0, 1, 2, 3]]],
    "pp2": [[[0, 1]], [[2, 3]]],
    "pp4": [[[0]], [[1]], [[2]], [[3]]],
    "pp2vpp2": [[[0], [2]], [[1], [3]]],
    "pp2first1": [[[0]], [[1, 2, 3]]],
    "pp2last1": [[[0, 1, 2]], [[3]]],
    "pp3ends1": [[[0]], [[1, 2]], [[3]]],
}


def grids(name: str) -> list[dict[str, int]]:
    if not TINY[name].is_moe:
        return [{"tp": tp} for tp in (1, 2, 4)]
    return [
        {"tp": tp, "ep": ep, "etp": etp}
        for tp, ep, etp in itertools.product((1, 2, 4), (1, 2, 4), (1, 2, 4))
        if tp % etp == 0
    ]


ALL = [(name, stages, grid) for name in MODELS for stages in STAGES for grid in grids(name)]
CASES = sorted(random.Random(3).sample(ALL, 60), key=str)
"""A sample over all pairs of a grid and stages, the same in every run."""


def weights(folder: Path) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        made |= load_file(file)
    return made


def write(source: Path, target: Path, names: str = "te", **layout: Any) -> Path:
    options = ConvertOptions(layout=ParallelLayout(**layout), legacy_names=names, workers=1)
    execute(plan_conversion(open_model(source), target, "torch", options))
    return target


def back(source: Path, target: Path) -> dict[str, Tensor]:
    execute(plan_conversion(open_model(source), target, "hf", ConvertOptions(workers=1)))
    return weights(target)


def assert_same(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor.contiguous().view(torch.uint8), right[name].contiguous().view(torch.uint8)), name


def dialects(name: str) -> tuple[str, ...]:
    return ("te", "te-sequential", "local") if TINY[name].is_moe else ("te", "local", "oldest")


def told(case: object) -> str:
    return case if isinstance(case, str) else "".join(f"{k}{v}" for k, v in case.items() if v > 1) or "tp1"  # type: ignore


@pytest.mark.parametrize(("name", "stages", "grid"), CASES, ids=told)
def test_hf_comes_back_bit_for_bit(
    name: str, stages: str, grid: dict[str, int], tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    names = dialects(name)[len(told(grid)) % 3]
    made = write(tiny_folder(name), tmp_path / "torch", names, **STAGES[stages], **grid)
    assert_same(weights(tiny_folder(name)), back(made, tmp_path / "hf"))


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("llama_tied", {"tp": 2}),
        ("qwen2_tied", {"tp": 4}),
        ("qwen2_moe", {"tp": 2, "ep": 2, "etp": 1}),
        ("qwen3_moe_dense_first", {"tp": 4, "ep": 2, "etp": 2}),
    ],
    ids=told,
)
def test_each_rank_holds_what_loops_say(
    name: str, grid: dict[str, int], stages: str, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    source = tiny_folder(name)
    config = json.loads((source / "config.json").read_text())
    for names in dialects(name):
        release = write(source, tmp_path / names, names, **STAGES[stages], **grid) / "release"
        expected = rank_models(weights(source), config, Ranks(deal=DEAL[stages], **grid), names)
        ranks = Ranks(deal=DEAL[stages], **grid)
        written = {ranks.folder(tp, pp, ep) for tp, ep in ranks.existing_pairs() for pp in range(len(DEAL[stages]))}
        assert {path.name for path in release.iterdir()} == written
        assert written <= expected.keys()
        for folder, models in ((folder, expected[folder]) for folder in sorted(written)):
            state = torch.load(release / folder / "model_optim_rng.pt", weights_only=False)
            assert state["checkpoint_version"] == 3.0
            assert state["iteration"] == 0
            assert {key for key in state if key.startswith("model")} == models.keys()
            for number, model in models.items():
                held = flat(state[number])
                assert_same(model, {key: value for key, value in held.items() if value is not None})
                assert all(key.endswith("._extra_state") for key, value in held.items() if value is None)
                if names == "oldest":
                    assert flat(nested(model)).keys() == held.keys()


def flat(model: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in model.items():
        made |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return made


def test_files_are_sound_archives_that_torch_loads_safely(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    release = write(tiny_folder("mixtral"), tmp_path / "torch", tp=2, pp=2, vpp=2, ep=2) / "release"
    with torch.serialization.safe_globals([argparse.Namespace]):
        for file in release.rglob("*.pt"):
            with zipfile.ZipFile(file) as archive:
                assert archive.testzip() is None  # every CRC-32 is right
                assert all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
            state = torch.load(file, weights_only=True)
            assert list(state)[:3] == ["args", "checkpoint_version", "iteration"]
            assert set(state) >= {"model0", "model1"}
            mapped = torch.load(file, weights_only=True, mmap=True)
            assert_same(
                {k: v for k, v in state["model0"].items() if v is not None},
                {k: v for k, v in mapped["model0"].items() if v is not None},
            )


def test_two_runs_write_the_same_bytes(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    digests = []
    for run in ("one", "two"):
        folder = write(tiny_folder("qwen2_moe"), tmp_path / run, tp=2, pp=2, ep=2)
        digests.append(
            {
                str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
                for path in folder.rglob("*")
                if path.is_file() and path.name != RECEIPT_NAME
            }
        )
    assert digests[0] == digests[1]


def test_dtypes_are_kept(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source", torch.bfloat16)
    made = write(source, tmp_path / "torch", tp=2)
    state = torch.load(made / "release" / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)
    assert {value.dtype for value in state["model"].values() if value is not None} == {torch.bfloat16}
    assert state["args"].params_dtype == torch.bfloat16
    assert_same(weights(source), back(made, tmp_path / "hf"))


def test_arguments_tell_layout_and_rank(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    layout = {"tp": 2, "pp": 2, "ep": 2, "first_stage_layers": 1}
    release = write(tiny_folder("mixtral"), tmp_path / "torch", **layout) / "release"
    args = torch.load(release / "mp_rank_01_001_001" / "model_optim_rng.pt", weights_only=False)["args"]
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (2, 2)
    assert (args.expert_model_parallel_size, args.expert_tensor_parallel_size) == (2, 2)
    assert (args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers) == (1, None)
    assert (args.ckpt_format, args.moe_grouped_gemm, args.transformer_impl) == ("torch", True, "transformer_engine")
    assert (args.rank, args.world_size) == (4 + 3, 8)


def test_only_the_pairs_that_exist_are_written(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    """Where ETP is smaller than TP, Megatron itself writes fewer files than names have room for."""
    made = write(tiny_folder("qwen2_moe"), tmp_path / "torch", tp=2, ep=4, etp=1)
    fewer = {"mp_rank_00_000", "mp_rank_00_002", "mp_rank_01_001", "mp_rank_01_003"}
    assert {path.name for path in (made / "release").iterdir()} == fewer
    assert_same(weights(tiny_folder("qwen2_moe")), back(made, tmp_path / "hf"))


def test_every_pair_of_another_converter_is_read(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    """Some write a file for each name there is room for, whether or not Megatron has such a rank."""
    source = tiny_folder("qwen2_moe")
    config = json.loads((source / "config.json").read_text())
    made = write(source, tmp_path / "torch", tp=2, ep=4, etp=1)
    sample = torch.load(made / "release" / "mp_rank_00_000" / "model_optim_rng.pt", weights_only=False)
    for name in ("rank", "world_size"):
        vars(sample["args"]).pop(name)
    for folder, models in rank_models(weights(source), config, Ranks(deal=DEAL[""], tp=2, ep=4, etp=1), "te").items():
        (made / "release" / folder).mkdir(exist_ok=True)
        torch.save({**sample, **models}, made / "release" / folder / "model_optim_rng.pt")
    assert len(list((made / "release").iterdir())) == 8
    assert_same(weights(source), back(made, tmp_path / "hf"))


def test_replicas_are_every_copy_of_what_is_used_once(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    model = open_model(write(tiny_folder("llama_tied"), tmp_path / "torch", tp=2, pp=2))
    assert isinstance(model.saved, LegacyFolder)
    copies = model.saved.replicas(model.family, model.config)
    names = sorted(name for name, _, _ in copies)
    norms = [name for name in model.tensors if "norm" in name]
    assert names == sorted([*norms, *["embedding.word_embeddings.weight"] * 2])
    assert all(torch.equal(used.read(), other.read()) for _, used, other in copies)
    assert len(model.sources) == len(norms) + 2 * (len(model.tensors) - len(norms))
    assert all(re.match(r"mp_rank_0\d_00\d:(embedding|decoder)\.", key) for key in model.sources)


def test_layouts_that_file_names_cannot_hold_are_refused(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    for layout in ({"tp": 1, "etp": 2}, {"tp": 2, "etp": 4, "ep": 2}):
        with pytest.raises(NotSupportedError, match="ETP"):
            write(tiny_folder("qwen2_moe"), tmp_path / "torch", **layout)
    with pytest.raises(NotSupportedError, match=r"'oldest'.*mlp\.experts"):
        write(tiny_folder("mixtral"), tmp_path / "torch", "oldest")
    with pytest.raises(NotSupportedError, match=r"'oldest'.*q_layernorm|'oldest'.*k_layernorm"):
        write(tiny_folder("qwen3"), tmp_path / "torch", "oldest")
    with pytest.raises(BadInputError, match="'newest'"):
        write(tiny_folder("llama"), tmp_path / "torch", "newest")
    assert not list(tmp_path.iterdir())


def test_arguments_follow_the_names_that_are_written(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    """Those of the run that saved the source are carried, but for what they say of its modules."""
    grouped = write(tiny_folder("qwen2_moe"), tmp_path / "te", tp=2)
    options = ConvertOptions(layout=ParallelLayout(ep=2), legacy_names="local", workers=1)
    execute(plan_reshard(open_model(grouped), tmp_path / "local", "torch", options))
    args = torch.load(tmp_path / "local/release/mp_rank_00_001/model_optim_rng.pt", weights_only=False)["args"]
    assert (args.moe_grouped_gemm, args.transformer_impl, args.expert_model_parallel_size) == (False, "local", 2)
    assert_same(weights(tiny_folder("qwen2_moe")), back(tmp_path / "local", tmp_path / "hf"))


@pytest.mark.parametrize(
    "layout",
    [{"ep": 2}, {"tp": 2, "ep": 2, "etp": 1}, {"tp": 4, "ep": 2, "etp": 2}, {"pp": 2}, {"pp": 2, "ep": 4}],
    ids=told,
)
def test_without_arguments_contents_and_shapes_tell_the_layout(
    layout: dict[str, int], tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    """mp_rank_00_001 may be a pipeline or an expert rank, and no name tells in how many parts an expert is cut."""
    hf = tiny_folder("qwen2_moe")
    made = write(hf, tmp_path / "torch", **layout)
    for file in made.rglob("*.pt"):
        state = torch.load(file, weights_only=False)
        del state["args"]
        torch.save(state, file)
    assert_same(weights(hf), back(made, tmp_path / "hf"))


@pytest.mark.parametrize("with_args", [True, False])
@pytest.mark.parametrize("layout", [{}, {"tp": 2, "ep": 2}, {"tp": 4, "pp": 2, "ep": 2, "etp": 2}], ids=told)
def test_the_former_grouped_experts_are_read(
    layout: dict[str, int], with_args: bool, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    """megatron-core up to 0.16: weight1.view(experts, hidden, -1) and weight2.view(experts, -1, hidden), x @ w."""
    hf = tiny_folder("mixtral")
    made = write(hf, tmp_path / "torch", **layout)
    for file in made.rglob("*.pt"):
        state = torch.load(file, weights_only=False)
        state["model"] = formerly_grouped(state["model"], hidden=64)
        if not with_args:
            del state["args"]
        torch.save(state, file)
    assert_same(weights(hf), back(made, tmp_path / "hf"))
    assert any(key.endswith(":decoder.layers.0.mlp.experts.weight1") for key in open_model(made).sources)


def formerly_grouped(model: dict[str, Any], hidden: int) -> dict[str, Any]:
    """A rank's model with its experts as the former GroupedMLP held them."""
    made = {key: tensor for key, tensor in model.items() if ".mlp.experts." not in key}
    for key in [key for key in model if key.endswith("linear_fc1.weight0")]:
        block = key.removesuffix("linear_fc1.weight0")
        for matrix, name in (("linear_fc1", "weight1"), ("linear_fc2", "weight2")):
            turned: list[Tensor] = []
            while (one := f"{block}{matrix}.weight{len(turned)}") in model:
                turned.append(model[one].T)
            stacked = torch.stack(turned).contiguous()
            made[block + name] = stacked.reshape(hidden, -1) if name == "weight1" else stacked.reshape(-1, hidden)
    return made
