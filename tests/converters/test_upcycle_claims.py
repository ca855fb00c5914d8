"""What is called exact is, and what is given is used; other claims, and options that do nothing, are refused.

The other side of each refusal is checked too, by transformers' own class on the written folder.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.model import open_model
from ckptbridge.converters.upcycling.construction import upcycled
from ckptbridge.converters.upcycling.layers import chosen_layers
from ckptbridge.converters.upcycling.semantics import Exactness, check
from ckptbridge.converters.upcycling.spec import UpcycleSpec
from ckptbridge.converters.upcycling.ties import LEAST_SPREAD, taken_of_equals
from tests.conftest import TinyFolders
from tests.converters.upcycle_cases import EXACT, TOLERANCE, spec_of, written
from tests.tiny import reference_logits, save_tiny, token_ids

_ZEROS: dict[str, Any] = {"router": "pre-softmax", "router_std": 0.0}


def grid(experts: int, granularity: int, topk: int) -> dict[str, Any]:
    return {"num_experts": experts, "granularity": granularity, "topk": topk}


def checked(folder: Path, **values: Any) -> Exactness:
    return check(UpcycleSpec(**values).resolved(), open_model(folder).config)


def spec_over(plain: dict[str, Any], values: dict[str, Any]) -> UpcycleSpec:
    return UpcycleSpec(**plain | values)


def difference(dense: Path, target: Path, **values: Any) -> float:
    """max |difference| of the logits, both by transformers in fp32."""
    folder = written(upcycled(open_model(dense), spec_over({"to": "hf", "seed": 3}, values)), target)
    return (reference_logits(folder, token_ids()) - reference_logits(dense, token_ids())).abs().max().item()


# ---- noise ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["contiguous", "random"])
def test_noise_on_a_partition_is_not_exact(split: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    values: dict[str, Any] = {"num_experts": 4, "topk": 4, "method": "split", "split": split, "router_std": 0.0}
    assert checked(tiny_folder("llama"), **values).is_exact
    assert difference(tiny_folder("llama"), tmp_path / "plain", **values) <= TOLERANCE
    noisy = checked(tiny_folder("llama"), **values, noise=0.3)
    assert any("noise of 0.3" in reason for reason in noisy.inexact)
    assert difference(tiny_folder("llama"), tmp_path / "noisy", **values, noise=0.3) > 100 * TOLERANCE


# ---- routers of zeros -----------------------------------------------------------------------------------------------

TORN = [grid(24, 8, 8), grid(9, 3, 6), grid(18, 6, 6)]
WHOLE = [grid(16, 4, 4), grid(16, 4, 8), grid(64, 8, 8), grid(8, 2, 4), grid(24, 8, 24)]


def _is_torn_here(sizes: dict[str, Any]) -> bool:
    """Counted anew: how often each shard is among what torch takes of equals."""
    taken = torch.full((1, sizes["num_experts"]), 1 / sizes["num_experts"]).topk(sizes["topk"]).indices[0]
    counts = torch.bincount(taken % sizes["granularity"], minlength=sizes["granularity"])
    return not torch.equal(counts, counts[:1].expand_as(counts))


@pytest.mark.parametrize("sizes", [*TORN, *WHOLE, grid(160, 8, 8), grid(12, 4, 4), grid(32, 8, 16)], ids=str)
@pytest.mark.parametrize("router", ["renormalised", "pre-softmax", "sigmoid"])
def test_a_router_of_zeros_is_exact_where_ties_leave_groups_whole(
    router: str, sizes: dict[str, Any], tiny_folder: TinyFolders
) -> None:
    values: dict[str, Any] = {**sizes, "router": router, "router_std": 0.0}
    if not _is_torn_here(sizes):
        assert checked(tiny_folder("llama"), **values).is_exact
        return
    with pytest.raises(BadInputError, match=r"router_std is 0 and granularity .*--router-groups.*--allow-inexact"):
        checked(tiny_folder("llama"), **values)
    allowed = checked(tiny_folder("llama"), **values, allow_inexact=True)
    assert any("all " in reason and "tie" in reason for reason in allowed.inexact)


@pytest.mark.parametrize("sizes", TORN, ids=str)
def test_torn_groups_do_differ(sizes: dict[str, Any], tiny_folder: TinyFolders, tmp_path: Path) -> None:
    values: dict[str, Any] = {**sizes, **_ZEROS, "allow_inexact": True}
    assert difference(tiny_folder("llama"), tmp_path / "moe", **values) > 100 * TOLERANCE


@pytest.mark.parametrize("sizes", [WHOLE[0], WHOLE[-1]], ids=str)
def test_whole_groups_do_not_differ(sizes: dict[str, Any], tiny_folder: TinyFolders, tmp_path: Path) -> None:
    assert difference(tiny_folder("llama"), tmp_path / "moe", **sizes, **_ZEROS) <= TOLERANCE


@pytest.mark.parametrize("permute", [False, True])
def test_groups_that_are_chosen_whole_may_tie(permute: bool, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        **TORN[0],
        "router": "sigmoid",
        "router_groups": True,
        "router_std": 0.0,
        "permute": permute,
    }
    found = checked(tiny_folder("llama"), **values)
    assert found.is_exact
    assert not any("tie, top-k takes" in condition for condition in found.conditions)
    assert difference(tiny_folder("llama"), tmp_path / "moe", **values) <= TOLERANCE


def test_a_router_that_is_nearly_zero_is_refused_alike(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    """Of 64 channels: the spread of the logits is 8 times the standard deviation of the rows."""
    values: dict[str, Any] = {**grid(16, 4, 4), "router_std": 1e-9}
    with pytest.raises(BadInputError, match=r"router_std is 1e-09 and granularity 4: .*tie between groups by rounding"):
        checked(tiny_folder("llama"), **values)
    with pytest.raises(BadInputError, match="by rounding"):
        checked(tiny_folder("llama"), **{**values, "router_std": LEAST_SPREAD / 8.1})
    assert checked(tiny_folder("llama"), **{**values, "router_std": LEAST_SPREAD / 7.9}).is_exact
    assert not checked(tiny_folder("llama"), **values, allow_inexact=True).is_exact
    assert difference(tiny_folder("llama"), tmp_path / "moe", **values, allow_inexact=True) > 100 * TOLERANCE
    assert checked(tiny_folder("llama"), **{**values, **grid(16, 4, 16)}).is_exact
    assert checked(tiny_folder("llama"), **{**values, **grid(16, 1, 4)}).is_exact


def test_rows_of_prompts_times_zero_are_zero(tiny_folder: TinyFolders) -> None:
    with pytest.raises(BadInputError, match="router_std is 0 and granularity 8"):
        checked(tiny_folder("llama"), **TORN[0], router_std=0.0, router_init="hidden-state")


def test_what_torch_takes_of_equals_is_what_is_said() -> None:
    assert taken_of_equals(5, 5) == (0, 1, 2, 3, 4)
    for experts, topk in ((24, 8), (64, 8)):
        taken = torch.full((3, experts), 1 / experts).softmax(-1).topk(topk).indices
        assert torch.equal(taken.sort(-1).values, torch.tensor([taken_of_equals(experts, topk)] * 3))


# ---- sigmoids near one ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "is_told"),
    [
        ({"router": "sigmoid"}, True),
        ({"router": "sigmoid", "router_groups": True}, False),
        ({"router": "renormalised"}, False),
        ({"router": "sigmoid", "granularity": 1}, False),
        ({"router": "sigmoid", "topk": 16}, False),
    ],
    ids=str,
)
def test_sigmoids_that_may_tie_at_one_are_told(values: dict[str, Any], is_told: bool, tiny_folder: TinyFolders) -> None:
    spec = spec_over(grid(16, 4, 4), values)
    dense = open_model(tiny_folder("llama"))
    found = check(spec.resolved(), dense.config)
    assert found.is_exact
    assert any("come near 17" in condition for condition in found.conditions) is is_told
    assert any("beyond logits" in n and "--router-groups" in n for n in upcycled(dense, spec).notes) is is_told


# ---- options that would do nothing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"split": "clustering"}, "split is 'clustering', which method copy does not use; it goes with --method split"),
        ({"drop_ratio": 0.9}, "drop_ratio is 0.9, which method copy does not use; it goes with --method drop"),
        ({"drop_mask": "per-matrix", "granularity": 2}, "drop_mask is 'per-matrix', which method virtual-group"),
        ({"method": "cmoe", "split": "random"}, "split is 'random', which method cmoe"),
        ({"shared_width": 48}, "shared_width is 48, which a shared expert of kind none .* --shared partition"),
        ({"shared": "overlap", "shared_width": 48}, "shared_width is 48, which a shared expert of kind overlap"),
        ({"shared": "partition", "shared_weight": 0.3}, "shared_weight is 0.3, .*kind partition .* --shared overlap"),
        ({"method": "split", "num_experts": 8, "granularity": 4}, "granularity is 4, which method split does not use"),
        ({"method": "cmoe", "num_experts": 8, "granularity": 2}, "granularity is 2, which method cmoe does not use"),
        ({"method": "cmoe", "permute": True}, "permute is True, which method cmoe does not use"),
        ({"method": "split", "split": "clustering", "permute": True}, "which split clustering does not use"),
        ({"layers": "::0"}, "layers is '::0': its step is 0"),
    ],
    ids=str,
)
def test_an_option_that_does_nothing_is_refused(values: dict[str, Any], words: str, tiny_folder: TinyFolders) -> None:
    with pytest.raises(BadInputError, match=words):
        upcycled(open_model(tiny_folder("llama")), spec_over({"num_experts": 4}, values))


@pytest.mark.parametrize(
    "values",
    [
        {"method": "split", "split": "random"},
        {"method": "split", "granularity": 4},
        {"method": "split", "permute": True},
        {"method": "drop", "drop_ratio": 0.9, "drop_mask": "per-matrix"},
        {"shared": "partition", "shared_width": 48},
        {"shared": "overlap", "shared_weight": 0.3},
        {"method": "cmoe", "shared_width": 48},
        {"permute": True},
    ],
    ids=str,
)
def test_the_same_options_where_they_do_something(values: dict[str, Any], tiny_folder: TinyFolders) -> None:
    checked(tiny_folder("llama"), **{"num_experts": 4, **values})


def test_a_resolved_spec_stays_what_it_is() -> None:
    for kind in EXACT:
        assert spec_of(EXACT[kind]).resolved().resolved() == spec_of(EXACT[kind]).resolved()
    split = UpcycleSpec(num_experts=8, method="split").resolved()
    assert (split.granularity, split.resolved()) == (8, split)


def test_a_step_of_one_and_more_is_taken() -> None:
    assert chosen_layers("::1", 3) == (1, 1, 1)
    assert chosen_layers("1::10", 3) == (0, 1, 0)


# ---- what mixtures claim --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "as_before", "instead"),
    [
        ("mixtral", True, ""),
        ("glm4_moe_air", True, ""),
        ("qwen3_moe_unnormalised", False, "all weights grow"),
        ("deepseek_v2", False, "may meet others too"),
        ("phimoe", False, "weights of tokens that met none of them may change too"),
    ],
)
def test_prune_promises_only_what_the_router_keeps(
    name: str, as_before: bool, instead: str, tiny_folder: TinyFolders
) -> None:
    experts = open_model(tiny_folder(name)).config.num_moe_experts or 0
    fewer = 8 if name == "deepseek_v2" else experts - 1
    (reason,) = checked(tiny_folder(name), num_experts=fewer, method="prune").inexact
    assert ("is computed as before" in reason) is as_before
    assert instead in reason


@pytest.mark.parametrize("router_groups", [False, True])
def test_copies_of_experts_want_a_router_in_fp32(router_groups: bool, tiny_folder: TinyFolders) -> None:
    experts = open_model(tiny_folder("glm4_moe_air")).config.num_moe_experts or 0
    found = checked(
        tiny_folder("glm4_moe_air"), num_experts=2 * experts, method="expert-upcycling", router_groups=router_groups
    )
    assert found.is_exact
    assert any("computed in fp32" in condition for condition in found.conditions) is not router_groups


# ---- what a person is told ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "offer"),
    [
        (grid(64, 8, 2), "Use --topk 8"),
        (grid(64, 8, 7), "Use --topk 8"),
        (grid(64, 8, 9), "Use --topk 8 or 16"),
        (grid(8, 2, 1), "Use --topk 2"),
        (grid(8, 4, 7), "Use --topk 4 or 8"),
    ],
    ids=str,
)
def test_a_top_k_is_offered_once(sizes: dict[str, Any], offer: str, tiny_folder: TinyFolders) -> None:
    with pytest.raises(BadInputError) as refused:
        checked(tiny_folder("llama"), **sizes)
    assert re.findall(r"Use [^.]*", str(refused.value)) == [offer]


@pytest.mark.parametrize(("granularity", "fails"), [(4, ()), (8, ("bf16",)), (16, ("fp32", "bf16"))])
def test_rows_that_transformers_cannot_multiply_are_told(
    granularity: int, fails: tuple[str, ...], tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    """96 neurons: experts of 24, 12 and 6, whose rows have 48, 24 and 12 bytes in bf16."""
    spec = UpcycleSpec(num_experts=granularity, topk=granularity, granularity=granularity)
    dense = open_model(save_tiny("llama", tmp_path / "dense"))
    moe = upcycled(dense, spec)
    told = [note for note in moe.notes if "16 bytes" in note]
    assert len(told) == bool(fails)
    assert all(word in note for note in told for word in (" and ".join(fails), 'experts_implementation="eager"'))
    folder = written(moe, tmp_path / "moe")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        if name in fails:
            with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
                model(token_ids())
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
        assert model(token_ids()).logits.isfinite().all()
