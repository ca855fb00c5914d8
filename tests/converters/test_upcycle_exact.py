"""Every way to upcycle that should compute the dense model's function does, in transformers' own class, reloaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.model import open_model
from ckptbridge.converters.tensors import InMemory, LazyTensor
from ckptbridge.converters.upcycling.construction import upcycled
from ckptbridge.converters.upcycling.semantics import check
from tests.conftest import TinyFolders
from tests.converters.upcycle_cases import EXACT, INEXACT, TOLERANCE, goes_with, spec_of, written
from tests.tiny import reference_logits, token_ids

QWEN2, GLM = "Qwen2MoeForCausalLM", "Glm4MoeForCausalLM"
CLASS_OF: dict[str, Callable[[dict[str, Any]], str]] = {
    "llama": lambda case: GLM if _is_sigmoid(case) else QWEN2 if _is_special(case) else "MixtralForCausalLM",
    "mistral": lambda case: "" if _is_sigmoid(case) else QWEN2 if _is_special(case) else "MixtralForCausalLM",
    "qwen2": lambda case: GLM if _is_sigmoid(case) else QWEN2,
    "qwen3": lambda case: GLM if _is_sigmoid(case) else "" if "shared" in case else "Qwen3MoeForCausalLM",
    "nemotron": lambda case: "",
}
"""The class that each source becomes; empty where transformers has none."""


def _is_sigmoid(case: dict[str, Any]) -> bool:
    return case.get("router") == "sigmoid"


def _is_special(case: dict[str, Any]) -> bool:
    """What Mixtral cannot say."""
    return bool({"shared", "layers"} & case.keys()) or case.get("router") == "pre-softmax"


COMPUTED = [
    (name, kind) for kind, case in EXACT.items() for name in CLASS_OF if CLASS_OF[name](case) and goes_with(name, kind)
]
REFUSED = [("nemotron", "E4G4T4"), ("nemotron", "sigmoid"), ("mistral", "sigmoid"), ("qwen3", "shared partition")]


@cache
def dense_logits(folder: Path) -> Tensor:
    return reference_logits(folder, token_ids())


def difference(folder: Path, dense: Path) -> float:
    """max |difference| of the logits of a written mixture and its dense source, both by transformers in fp32."""
    return (reference_logits(folder, token_ids()) - dense_logits(dense)).abs().max().item()


@pytest.mark.parametrize(("name", "kind"), COMPUTED)
def test_the_mixture_is_the_dense_models_function(
    name: str, kind: str, tiny_folder: TinyFolders, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    dense = open_model(tiny_folder(name))
    spec = spec_of(EXACT[kind], to="hf")
    assert check(spec.resolved(), dense.config).is_exact
    folder = written(upcycled(dense, spec), tmp_path / "moe")
    found = difference(folder, tiny_folder(name))
    record_property("max_abs_diff", found)
    assert found <= TOLERANCE
    assert json.loads((folder / "config.json").read_text())["architectures"] == [CLASS_OF[name](EXACT[kind])]


@pytest.mark.parametrize(("name", "kind"), REFUSED)
def test_what_no_class_computes_is_refused_for_hugging_face(name: str, kind: str, tiny_folder: TinyFolders) -> None:
    with pytest.raises(NotSupportedError) as refused:
        upcycled(open_model(tiny_folder(name)), spec_of(EXACT[kind], to="hf"))
    assert not CLASS_OF[name](EXACT[kind])
    for word in ("MixtralForCausalLM: ", "Glm4MoeForCausalLM: ", "NemotronMoeOfMegatronOnly: "):
        assert word in str(refused.value)


@pytest.mark.parametrize("kind", INEXACT)
@pytest.mark.parametrize("name", ["llama"])
def test_what_differs_is_said_to_differ(
    name: str, kind: str, tiny_folder: TinyFolders, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    dense = open_model(tiny_folder(name))
    spec = spec_of(INEXACT[kind])
    assert not check(spec.resolved(), dense.config).is_exact
    found = difference(written(upcycled(dense, spec), tmp_path / "moe"), tiny_folder(name))
    record_property("max_abs_diff", found)
    assert found > 100 * TOLERANCE


@pytest.mark.parametrize("kind", ["E4G4T4", "sigmoid", "shared partition"])
def test_router_rows_that_no_group_shares_are_seen(kind: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    moe = upcycled(open_model(tiny_folder("llama")), spec_of(EXACT[kind]))
    generator = torch.Generator().manual_seed(1)
    rows: dict[str, LazyTensor] = {
        name: InMemory(0.3 * torch.randn(tensor.shape, generator=generator))
        for name, tensor in moe.tensors.items()
        if name.endswith("router.weight")
    }
    folder = written(replace(moe, tensors={**moe.tensors, **rows}), tmp_path / "moe")
    assert difference(folder, tiny_folder("llama")) > 100 * TOLERANCE


def test_groups_hold_together_whatever_the_routers_rows_are(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    """Group-limited routing picks whole groups; without equal rows their weights differ, and the sum is only near."""
    differences: list[float] = []
    for kind in ("sigmoid", "sigmoid, groups E4G4T8"):
        moe = upcycled(open_model(tiny_folder("llama")), spec_of(EXACT[kind]))
        generator = torch.Generator().manual_seed(1)
        rows: dict[str, LazyTensor] = {
            name: InMemory(0.02 * torch.randn(tensor.shape, generator=generator))
            for name, tensor in moe.tensors.items()
            if name.endswith("router.weight")
        }
        folder = written(replace(moe, tensors={**moe.tensors, **rows}), tmp_path / kind)
        differences.append(difference(folder, tiny_folder("llama")))
    assert differences[1] < 0.5 * differences[0]


def test_one_chosen_sigmoid_is_always_one(tiny_folder: TinyFolders) -> None:
    with pytest.raises(BadInputError, match="router gets no gradient"):
        upcycled(open_model(tiny_folder("llama")), spec_of({"num_experts": 4, "topk": 1, "router": "sigmoid"}))
