"""The oldest legacy files, as early Megatron-LM and PAI-Megatron-Patch wrote them, made by hand and read."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.model import open_model
from tests.conftest import TinyFolders
from tests.converters.legacy_naive import Models, Ranks, nested, rank_models
from tests.converters.test_legacy import DEAL, assert_same, back, flat, weights, write

Spelling = Callable[[str], str]


def as_it_is(key: str) -> str:
    return key


def of_2020(key: str) -> str:
    """Megatron-LM before `encoder` and `self_attention`."""
    return key.replace(".encoder.", ".transformer.").replace(".self_attention.", ".attention.")


def of_2024(key: str) -> str:
    """Megatron-LM's own modules before they were removed: norms are called norms."""
    return key.replace("layernorm.", "norm.")


def save(root: Path, files: dict[str, Models], args: dict[str, Any] | None, **items: Any) -> Path:
    for folder, models in files.items():
        path = root / "release" / folder
        path.mkdir(parents=True)
        state: dict[str, Any] = {"checkpoint_version": 3.0, "iteration": 0, **models, **items}
        if args is not None:
            state["args"] = argparse.Namespace(**args)
        torch.save(state, path / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("release")
    return root


def made_by_hand(
    hf: Path, root: Path, ranks: Ranks, spelled: Spelling = as_it_is, *, in_dictionaries: bool = True, **items: Any
) -> Path:
    config = json.loads((hf / "config.json").read_text())
    files = rank_models(weights(hf), config, ranks, "oldest")
    for models in files.values():
        for number, model in models.items():
            renamed = {spelled(key): tensor for key, tensor in model.items()}
            models[number] = nested(renamed) if in_dictionaries else renamed
    return save(root, files, None, **items)


@pytest.mark.parametrize("stages", ["", "pp2", "pp2vpp2", "pp3ends1"])
@pytest.mark.parametrize("spelled", [as_it_is, of_2020, of_2024])
@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2"])
def test_files_without_arguments_are_read(
    name: str, spelled: Spelling, stages: str, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    """Nothing but names, shapes and the config.json tells what they are."""
    hf = tiny_folder(name)
    made = made_by_hand(hf, tmp_path / "torch", Ranks(deal=DEAL[stages], tp=2), spelled)
    (made / "hf").mkdir()
    (made / "hf" / "config.json").write_bytes((hf / "config.json").read_bytes())
    assert_same(weights(hf), back(made, tmp_path / "hf"))


def test_dotted_keys_prefixes_and_what_carries_no_weights(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    hf = tiny_folder("qwen2")
    made = made_by_hand(
        hf,
        tmp_path / "torch",
        Ranks(deal=DEAL["pp2"], tp=2),
        lambda key: f"module.module.{key}",
        in_dictionaries=False,
    )
    for file in made.rglob("*.pt"):
        state = torch.load(file, weights_only=False)
        state["model"]["module.module.language_model.encoder.layers.0.self_attention.rotary_emb.inv_freq"] = torch.ones(
            4
        )
        state["model"]["module.module.language_model.encoder.layers.0.mlp._extra_state"] = torch.zeros(3)
        torch.save(state, file)
    (made / "hf").mkdir()
    (made / "hf" / "config.json").write_bytes((hf / "config.json").read_bytes())
    assert_same(weights(hf), back(made, tmp_path / "hf"))


@pytest.mark.parametrize("stages", ["", "pp2", "pp2vpp2"])
@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2"])
def test_what_is_written_is_what_is_made_by_hand(
    name: str, stages: str, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    hf = tiny_folder(name)
    layout: dict[str, Any] = {"": {}, "pp2": {"pp": 2}, "pp2vpp2": {"pp": 2, "vpp": 2}}[stages]
    ours = write(hf, tmp_path / "ours", "oldest", tp=2, **layout)
    hand = made_by_hand(hf, tmp_path / "hand", Ranks(deal=DEAL[stages], tp=2))
    for file in sorted(hand.rglob("*.pt")):
        left = torch.load(file, weights_only=False)
        right = torch.load(ours / file.relative_to(hand), weights_only=False)
        models = [key for key in left if key.startswith("model")]
        assert models
        for key in models:
            assert left[key].keys() == right[key].keys()  # nested alike
            assert_same(flat(left[key]), flat(right[key]))
    args = torch.load(
        ours / "release" / sorted(p.name for p in (ours / "release").iterdir())[0] / "model_optim_rng.pt",
        weights_only=False,
    )["args"]
    assert args.use_legacy_models
    assert not args.moe_grouped_gemm


def test_another_order_of_heads_is_refused_by_its_version(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    for version in (0, 1.0):
        made = made_by_hand(
            tiny_folder("llama"), tmp_path / f"torch{version}", Ranks(deal=DEAL[""]), checkpoint_version=version
        )
        with pytest.raises(NotSupportedError, match=f"checkpoint_version {version}"):
            open_model(made, hf_config=tiny_folder("llama"))


def test_biases_that_no_supported_model_has_are_named(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    made = made_by_hand(tiny_folder("llama"), tmp_path / "torch", Ranks(deal=DEAL["pp2"]))
    file = made / "release" / "mp_rank_00_001" / "model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    state["model"]["language_model"]["encoder"]["layers.1.mlp.dense_4h_to_h.bias"] = torch.zeros(64)
    torch.save(state, file)
    with pytest.raises(BadInputError, match=r"1 unexpected.*mp_rank_00_001:.*dense_4h_to_h\.bias"):
        open_model(made, hf_config=tiny_folder("llama"))
