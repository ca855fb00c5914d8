"""Faults planted in legacy checkpoints: those that headers show are refused, the others show in the values."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.execute import execute, partial_folder
from ckptbridge.converters.mcore.legacy.replicas import WHOLE_NBYTES
from ckptbridge.converters.model import open_model
from tests import tiny
from tests.conftest import TinyFolders
from tests.converters.test_legacy import back, weights, write
from tests.tiny import TinyModel, save_tiny

State = dict[str, Any]


def edit(folder: Path, rank: str, change: Callable[[State], None]) -> None:
    """Change one rank's file as torch reads and writes it."""
    file = folder / "release" / rank / "model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    change(state)
    torch.save(state, file)


def edit_all(folder: Path, change: Callable[[State], None]) -> None:
    for path in sorted((folder / "release").iterdir()):
        edit(folder, path.name, change)


def swap_keys(one: str, other: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        model = state["model"]
        for key in [key for key in model if one in key]:
            model[key], model[key.replace(one, other)] = model[key.replace(one, other)], model[key]

    return change


def swap_files(folder: Path, one: str, other: str) -> None:
    release = folder / "release"
    (release / one).rename(folder / "aside")
    (release / other).rename(release / one)
    (folder / "aside").rename(release / other)


def changed_names(source: Path, made: Path, target: Path) -> set[str]:
    """The Hugging Face tensors that come back other than they were."""
    left, right = weights(source), back(made, target)
    assert left.keys() == right.keys()
    return {name for name, tensor in left.items() if not torch.equal(tensor, right[name])}


def test_two_ranks_files_swapped_are_refused_by_the_rank_in_their_args(
    tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    made = write(tiny_folder("llama"), tmp_path / "torch", tp=2, pp=2)
    swap_files(made, "mp_rank_00_000", "mp_rank_01_000")
    with pytest.raises(BadInputError, match=r"mp_rank_00_000.*saved by rank 1, whose tensor parallel rank is 1"):
        open_model(made)
    edit_all(made, lambda state: delattr(state["args"], "rank"))
    changed = changed_names(tiny_folder("llama"), made, tmp_path / "hf")
    assert {"model.embed_tokens.weight", "model.layers.0.mlp.gate_proj.weight"} <= changed
    assert not any(".layers.3." in name for name in changed)


def test_swapped_stages_are_refused_by_what_they_hold(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    """Layers carry no number of their own, so equal stages differ by their ends alone."""
    made = write(tiny_folder("llama"), tmp_path / "torch", pp=4)
    swap_files(made, "mp_rank_00_001", "mp_rank_00_002")
    with pytest.raises(BadInputError, match=r"mp_rank_00_001.*saved by rank 2, whose pipeline rank is 2"):
        open_model(made)


def _halves(first: State, second: State, key: str) -> None:
    rows = [model[key].chunk(2) for model in (first, second)]
    first[key], second[key] = (torch.cat([half[part] for half in rows]) for part in (0, 1))


def test_gate_and_up_cut_as_one_matrix_show(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    """torch_dist keeps all of gate_proj above all of up_proj; a rank's file has its part of each."""
    made = write(tiny_folder("llama"), tmp_path / "torch", tp=2)
    files = [made / "release" / rank / "model_optim_rng.pt" for rank in ("mp_rank_00", "mp_rank_01")]
    states = [torch.load(file, weights_only=False) for file in files]
    _halves(states[0]["model"], states[1]["model"], "decoder.layers.2.mlp.linear_fc1.weight")
    for file, state in zip(files, states, strict=True):
        torch.save(state, file)
    changed = changed_names(tiny_folder("llama"), made, tmp_path / "hf")
    assert changed == {f"model.layers.2.mlp.{part}_proj.weight" for part in ("gate", "up")}


def test_layers_in_another_order_show(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    made = write(tiny_folder("llama"), tmp_path / "torch", pp=2)
    edit(made, "mp_rank_00_001", swap_keys("layers.0.", "layers.1."))
    changed = changed_names(tiny_folder("llama"), made, tmp_path / "hf")
    assert {name.split(".")[2] for name in changed} == {"2", "3"}


def test_swapped_experts_show(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    made = write(tiny_folder("qwen3_moe"), tmp_path / "torch", ep=4)
    for matrix in ("linear_fc1", "linear_fc2"):
        key = f"layers.1.mlp.experts.{matrix}.weight"
        edit(made, "mp_rank_00_002", swap_keys(f"{key}0", f"{key}1"))
    changed = changed_names(tiny_folder("qwen3_moe"), made, tmp_path / "hf")
    assert {tuple(name.split(".")[2:6]) for name in changed} == {("1", "mlp", "experts", e) for e in ("4", "5")}


def test_a_missing_rank_is_named(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    made = write(tiny_folder("mixtral"), tmp_path / "torch", tp=2, pp=2, ep=2)
    shutil.rmtree(made / "release" / "mp_rank_01_001_001")
    (made / "release" / "mp_rank_00_000_001" / "model_optim_rng.pt").unlink()
    with pytest.raises(BadInputError, match=r"mp_rank_00_000_001/model_optim_rng\.pt: the file is missing.*nothing"):
        open_model(made)
    shutil.rmtree(made / "release" / "mp_rank_00_000_001")
    with pytest.raises(BadInputError, match=r"2 ranks are missing: mp_rank_00_000_001/.*, mp_rank_01_001_001/"):
        open_model(made)
    edit_all(made, lambda state: state.pop("args"))
    with pytest.raises(BadInputError, match=r"missing.*experts"):
        open_model(made, hf_config=tiny_folder("mixtral"))


def _add_one_to(key: str, row: int) -> Callable[[State], None]:
    def change(state: State) -> None:
        tensor: Tensor = state["model"][key]
        tensor[row] += 1

    return change


def test_a_changed_replica_is_refused_before_output(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    for rank, key, name in (
        ("mp_rank_01_001", "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight", "layers.3.*layer_norm"),
        ("mp_rank_01_001", "output_layer.weight", "word_embeddings"),
    ):
        made = write(tiny_folder("llama_tied"), tmp_path / key, tp=2, pp=2)
        edit(made, rank, _add_one_to(key, 60))
        plan = plan_conversion(open_model(made), tmp_path / "hf", "hf", ConvertOptions(workers=1))
        with pytest.raises(BadInputError, match=rf"{rank}/.*its copy of .*{name}.*differs from"):
            execute(plan)
        assert not (tmp_path / "hf").exists()
        assert not partial_folder(plan.target).exists()


def test_large_replicas_are_compared_at_three_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wide = TinyModel(hf_class="Llama", config={"vocab_size": 8192, "tie_word_embeddings": True})
    monkeypatch.setitem(tiny.EVERY, "wide", wide)
    source = save_tiny("wide", tmp_path / "source")
    assert WHOLE_NBYTES < 8192 * 64 * 4
    made = write(source, tmp_path / "torch", pp=2)
    for number, row in enumerate((0, 4096, 8191)):
        edit(made, "mp_rank_00_001", _add_one_to("output_layer.weight", row))
        with pytest.raises(BadInputError, match="word_embeddings"):
            back(made, tmp_path / f"hf{number}")
        made = write(source, tmp_path / f"torch{number}", pp=2)
