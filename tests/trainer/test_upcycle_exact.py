"""Every exact way to upcycle, written for Megatron, opened again and computed by our decoder, against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from ckptbridge.converters.errors import NotSupportedError
from ckptbridge.converters.model import open_model
from ckptbridge.converters.upcycling.construction import upcycled
from ckptbridge.converters.upcycling.semantics import check
from ckptbridge.trainer.verify import verify
from tests.conftest import TinyFolders
from tests.converters.upcycle_cases import EXACT, SOURCES, TOLERANCE, goes_with, spec_of, written
from tests.tiny import reference_logits, token_ids
from tests.trainer.decoder_run import decoder_logits

REFUSED = {
    ("qwen3", kind): "--router sigmoid"
    for kind, case in EXACT.items()
    if "shared" in case and case.get("router") != "sigmoid"
}
"""What no class computes: norms of heads beside a shared expert and a softmax."""
REFUSED["qwen3", "shared partition of a quarter"] = "no multiple of moe_ffn_hidden_size"
COMPUTED = [(name, kind) for kind in EXACT for name in SOURCES if goes_with(name, kind) and (name, kind) not in REFUSED]


@pytest.fixture(scope="module")
def dense_logits(tiny_folder: TinyFolders) -> Callable[[str], Tensor]:
    made: dict[str, Tensor] = {}

    def logits(name: str) -> Tensor:
        if name not in made:
            made[name] = reference_logits(tiny_folder(name), token_ids())
        return made[name]

    return logits


@pytest.mark.parametrize(("name", "kind"), COMPUTED)
def test_the_decoder_computes_the_dense_models_function(
    name: str,
    kind: str,
    tiny_folder: TinyFolders,
    tmp_path: Path,
    dense_logits: Callable[[str], Tensor],
    record_property: Callable[[str, object], None],
) -> None:
    moe = upcycled(open_model(tiny_folder(name)), spec_of(EXACT[kind], to="mcore"))
    found = (decoder_logits(written(moe, tmp_path / "mcore", "torch_dist")) - dense_logits(name)).abs().max().item()
    record_property("max_abs_diff", found)
    assert found <= TOLERANCE


@pytest.mark.parametrize(("name", "kind"), REFUSED)
def test_what_no_class_computes_is_refused(name: str, kind: str, tiny_folder: TinyFolders) -> None:
    with pytest.raises(NotSupportedError, match=REFUSED[name, kind]):
        upcycled(open_model(tiny_folder(name)), spec_of(EXACT[kind], to="mcore"))


@pytest.mark.parametrize(
    ("values", "is_exact"),
    [
        ({"scaling": "paper"}, True),
        ({"scaling": "paper", "router": "pre-softmax", "router_std": 0.0}, True),
        ({"scaling": "none"}, False),
        ({"router": "pre-softmax", "router_std": 0.02}, False),
    ],
    ids=str,
)
def test_the_published_cube_root_is_exact_for_squared_relu_alone(
    values: dict[str, object],
    is_exact: bool,
    tiny_folder: TinyFolders,
    tmp_path: Path,
    dense_logits: Callable[[str], Tensor],
) -> None:
    dense = open_model(tiny_folder("nemotron"))
    spec = spec_of(EXACT["E4G4T4"] | values)
    assert check(spec.resolved(), dense.config).is_exact is is_exact
    found = decoder_logits(written(upcycled(dense, spec), tmp_path / "mcore", "torch_dist")) - dense_logits("nemotron")
    assert (found.abs().max().item() <= TOLERANCE) is is_exact


@pytest.mark.parametrize("kind", ["sigmoid, groups", "shared partition"])
def test_verify_compares_a_mixture_that_only_megatron_has(kind: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    dense = tiny_folder("nemotron")
    there = written(upcycled(open_model(dense), spec_of(EXACT[kind])), tmp_path / "mcore", "torch_dist")
    report = verify(dense, there, tokens=64)
    assert report.passed
    assert report.first_divergence is None
    assert report.max_abs_logit_difference <= TOLERANCE
