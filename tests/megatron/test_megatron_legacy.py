"""Legacy checkpoints against the real megatron-core, rank by rank: its own files are read, ours are loaded strictly.

Transformer Engine does not run here, so files with its names are loaded by modules without it, each name turned
into the one that Megatron's other spec gives the same weight.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import Model, open_model
from ckptbridge.trainer.megatron.layouts import parse_layouts
from ckptbridge.trainer.verify import verify
from tests import tiny
from tests.conftest import TinyFolders
from tests.megatron.conftest import Report
from tests.megatron.hf_to_megatron import megatron_kwargs
from tests.megatron.launch import MEGATRON, check_fetched
from tests.megatron.legacy_launch import LegacyCase, LegacyLayout, LegacyResult, launch_legacy
from tests.tiny import TINY, VOCAB_SIZE, TinyModel, reference_logits, save_tiny, token_ids

pytestmark = [pytest.mark.mcore, pytest.mark.xdist_group("megatron-legacy")]

TOLERANCE = 1e-5
FAULT = 1e-3

# Six layers can be dealt unevenly to chunks.
LONG = "llama_six_layers"
DENSE = (
    LegacyLayout(),
    LegacyLayout(tp=2, pp=2),
    LegacyLayout(tp=4),
    LegacyLayout(pp=2, vpp=2),
    LegacyLayout(tp=2, pp=2, first=1),
    LegacyLayout(pp=4, vpp=1),
    LegacyLayout(tp=2, pp=2, last=1),
)
UNEVEN = (
    LegacyLayout(pp=2, vpp=2, first=2),
    LegacyLayout(tp=2, pp=2, vpp=3),
    LegacyLayout(pp=4, first=1, last=1),
    LegacyLayout(pp=2, vpp=2, last=2),
)
MOE = (
    LegacyLayout(tp=2),
    LegacyLayout(ep=4),
    LegacyLayout(tp=2, ep=2),
    LegacyLayout(tp=2, ep=2, etp=2),
    LegacyLayout(tp=2, ep=4),
    LegacyLayout(tp=4, ep=2, etp=2),
    LegacyLayout(pp=2, ep=2),
    LegacyLayout(tp=2, pp=2, ep=2),
    LegacyLayout(pp=2, vpp=2, ep=2),
)
LOADS = [
    *(("llama", layout) for layout in DENSE),
    *(("llama_tied", layout) for layout in (LegacyLayout(tp=2), LegacyLayout(tp=2, pp=2), LegacyLayout(pp=2, vpp=2))),
    *((LONG, layout) for layout in UNEVEN),
    *((model, layout) for model in ("mixtral", "qwen2_moe", "qwen3_moe") for layout in MOE),
    *(("qwen3_moe_dense_first", layout) for layout in (LegacyLayout(pp=2, ep=2, first=1), LegacyLayout(pp=2, vpp=2))),
]
SAVES = [
    *(("llama", layout) for layout in (LegacyLayout(), LegacyLayout(tp=2, pp=2, first=1), LegacyLayout(pp=2, vpp=2))),
    ("llama_tied", LegacyLayout(tp=2, pp=2)),
    (LONG, LegacyLayout(pp=2, vpp=2, first=2)),
    ("mixtral", LegacyLayout(tp=2, pp=2, ep=2)),
    ("qwen2_moe", LegacyLayout(tp=2, ep=4)),
    ("qwen2_moe", LegacyLayout(tp=4, ep=2, etp=2)),
    ("qwen3_moe", LegacyLayout(tp=2, ep=2, etp=2)),
    ("qwen3_moe_dense_first", LegacyLayout(pp=2, vpp=2, ep=2)),
]
State = dict[str, Any]


def _edit(edit: Callable[[State], None], *ranks: str) -> Callable[[Path], None]:
    """Change the weights in some ranks' files, as torch reads and writes them."""

    def change(release: Path) -> None:
        for rank in ranks:
            file = release / rank / "model_optim_rng.pt"
            state = torch.load(file, weights_only=False)
            edit(state["model"])
            torch.save(state, file)

    return change


def _swap(state: State, one: str, other: str) -> None:
    for key in [key for key in state if one in key and state[key] is not None]:
        state[key], state[key.replace(one, other)] = state[key.replace(one, other)], state[key]


def _swap_files(release: Path) -> None:
    one, other = (release / rank / "model_optim_rng.pt" for rank in ("mp_rank_00", "mp_rank_01"))
    held = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(held)


def _uncut_gate_and_up(release: Path) -> None:
    """Rows cut as if gate_proj and up_proj were one matrix: one lies on the first rank, the other on the second."""
    files = [release / rank / "model_optim_rng.pt" for rank in ("mp_rank_00", "mp_rank_01")]
    states = [torch.load(file, weights_only=False) for file in files]
    key = "decoder.layers.1.mlp.linear_fc1.weight"
    halves = [state["model"][key].chunk(2) for state in states]
    for number, (file, state) in enumerate(zip(files, states, strict=True)):
        state["model"][key] = torch.cat([half[number] for half in halves])
        torch.save(state, file)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A change of what was written; without it the model computes what transformers does."""

    model: str
    layout: LegacyLayout
    change: Callable[[Path], None]


FAULTS = {
    "the files of two ranks swapped": Fault(model="llama", layout=LegacyLayout(tp=2), change=_swap_files),
    "gate_proj and up_proj cut as one": Fault(model="llama", layout=LegacyLayout(tp=2), change=_uncut_gate_and_up),
    "two layers of a stage swapped": Fault(
        model="llama",
        layout=LegacyLayout(tp=2, pp=2),
        change=_edit(lambda state: _swap(state, "layers.0.", "layers.1."), "mp_rank_00_001", "mp_rank_01_001"),
    ),
    "two experts of a rank swapped": Fault(
        model="qwen3_moe",
        layout=LegacyLayout(ep=4),
        change=_edit(lambda state: _swap(state, "local_experts.0.", "local_experts.1."), "mp_rank_00_002"),
    ),
}
Case = tuple[LegacyCase, LegacyResult]
Cases = dict[tuple[str, ...], Case]


@pytest.fixture(scope="module")
def legacy(tiny_folder: TinyFolders, tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """By ("local" or "te", model, layout), ("fault", name) and ("save", model, layout): one job."""
    check_fetched()
    root = tmp_path_factory.mktemp("legacy")
    long = TinyModel(hf_class="Llama", config={"num_hidden_layers": 6})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.EVERY, LONG, long)
        save_tiny(LONG, root / LONG)
    folders = {name: root / LONG if name == LONG else tiny_folder(name) for name, _ in (*LOADS, *SAVES)}
    expected = {name: reference_logits(folder, token_ids()) for name, folder in folders.items()}
    cases: dict[tuple[str, ...], LegacyCase] = {}
    for model, layout in LOADS:
        for names in ("local", "te"):
            target = root / f"{model}-{layout}-{names}"
            converted = written(folders[model], target, layout, names)
            cases[names, model, str(layout)] = case_of(converted, folders[model], layout, expected[model], names)
    for name, fault in FAULTS.items():
        target = root / name.replace(" ", "-")
        converted = written(folders[fault.model], target, fault.layout, "local")
        fault.change(converted / "release")
        cases["fault", name] = case_of(converted, folders[fault.model], fault.layout, expected[fault.model], "local")
    for model, layout in SAVES:
        cases["save", model, str(layout)] = case_of(
            root / f"saved-{model}-{layout}", folders[model], layout, None, "local"
        )
    results = launch_legacy(list(cases.values()), root / "job")
    return {key: (case, result) for (key, case), result in zip(cases.items(), results, strict=True)}


def written(hf: Path, target: Path, layout: LegacyLayout, names: str) -> Path:
    options = ConvertOptions(layout=layout.ours(), legacy_names=names, workers=1)
    execute(plan_conversion(open_model(hf), target, "torch", options))
    for folder in (target / "release").iterdir():
        if _pair(folder.name, layout) not in layout.ours().file_ranks():
            shutil.rmtree(folder)  # no rank is to ask for it
    return target


def _pair(folder: str, layout: LegacyLayout) -> tuple[int, int]:
    numbers = [int(number) for number in folder.split("_")[2:]]
    return numbers[0], numbers[-1] if layout.ep > 1 else 0


def case_of(root: Path, hf: Path, layout: LegacyLayout, expected: Tensor | None, names: str) -> LegacyCase:
    config = megatron_kwargs(json.loads((hf / "config.json").read_text()))
    multiple = 128 * layout.tp
    config["gpt"]["vocab_size"] = -(-VOCAB_SIZE // multiple) * multiple
    return LegacyCase(
        root=root, layout=layout, config=config, tokens=token_ids(), expected=expected, te_names=names == "te"
    )


@pytest.mark.parametrize("names", ["local", "te"])
@pytest.mark.parametrize(("model", "layout"), LOADS, ids=str)
def test_every_rank_loads_its_file_and_computes_what_transformers_does(
    legacy: Cases, record_property: Report, model: str, layout: LegacyLayout, names: str
) -> None:
    result = legacy[names, model, str(layout)][1]
    assert result.in_order, "the entries do not stand in the order of the modules' own state dict"
    assert result.max_abs_diff is not None
    record_property("max_abs_diff", result.max_abs_diff)
    assert result.max_abs_diff <= TOLERANCE


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_shows(legacy: Cases, record_property: Report, name: str) -> None:
    difference = legacy["fault", name][1].max_abs_diff
    assert difference is not None
    record_property("max_abs_diff", difference)
    assert difference > FAULT


def equal(one: Model, other: Model) -> bool:
    assert one.tensors.keys() == other.tensors.keys()
    return all(torch.equal(one.tensors[name].read(), other.tensors[name].read()) for name in one.tensors)


@pytest.mark.parametrize(("model", "layout"), SAVES, ids=str)
def test_what_megatron_saves_is_read_as_its_torch_dist_is(
    legacy: Cases, record_property: Report, tmp_path: Path, model: str, layout: LegacyLayout
) -> None:
    case, result = legacy["save", model, str(layout)]
    read = open_model(case.root / "legacy")
    assert read.format == "torch"
    assert read.iteration == 7
    assert equal(read, open_model(case.root / "torch_dist"))
    execute(plan_conversion(read, tmp_path / "hf", "hf", ConvertOptions(workers=1)))
    logits, expected = reference_logits(tmp_path / "hf", case.tokens), result.logits
    assert expected is not None
    difference = (logits - expected[..., : logits.shape[-1]]).abs().max().item()
    record_property("max_abs_diff", difference)
    assert difference <= TOLERANCE


def test_saved_files_say_which_rank_they_are_of(legacy: Cases, tmp_path: Path) -> None:
    """Without that a swap shows in the values alone: it is another model then (test_legacy_faults.py)."""
    layout = LegacyLayout(tp=2, pp=2, first=1)
    case, _ = legacy["save", "llama", str(layout)]
    folder = tmp_path / "swapped"
    shutil.copytree(case.root / "legacy", folder)
    one, other = (folder / "iter_0000007" / name for name in ("mp_rank_00_001", "mp_rank_01_001"))
    one.rename(folder / "aside")
    other.rename(one)
    (folder / "aside").rename(other)
    with pytest.raises(BadInputError, match=r"mp_rank_00_001.*was saved by rank"):
        open_model(folder)


def test_the_files_that_megatron_saves_are_those_that_are_read(legacy: Cases, tmp_path: Path) -> None:
    """Where experts are cut less than the rest, only some pairs of ranks exist: each of them is asked for."""
    case, _ = legacy["save", "qwen2_moe", str(LegacyLayout(tp=2, ep=4))]
    folder = tmp_path / "less"
    shutil.copytree(case.root / "legacy", folder)
    there = sorted(path.name for path in (folder / "iter_0000007").iterdir())
    assert there == ["mp_rank_00_000", "mp_rank_00_002", "mp_rank_01_001", "mp_rank_01_003"]
    assert sorted(f"mp_rank_{tp:02d}_{ep:03d}" for tp, ep in case.layout.ours().file_ranks()) == there
    shutil.rmtree(folder / "iter_0000007" / "mp_rank_01_003")
    with pytest.raises(BadInputError, match="mp_rank_01_003"):
        open_model(folder)


def test_models_have_the_tested_names() -> None:
    assert {model for model, _ in (*LOADS, *SAVES)} - {LONG} <= set(TINY)
    assert replace(LegacyLayout(tp=2), pp=2).ours().world_size == 4


def test_verify_computes_legacy_files_with_megatron(
    tiny_folder: TinyFolders, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is written as torch_dist first, which any layout loads."""
    monkeypatch.syspath_prepend(str(MEGATRON))
    made = written(tiny_folder("mixtral"), tmp_path / "torch", LegacyLayout(tp=2, pp=2), "te")
    report = verify(tiny_folder("mixtral"), made, tokens=64, engine="megatron", layouts=parse_layouts("ep2"))
    assert report.passed, report
    assert [(row.checkpoint, row.layout, row.missing_keys) for row in report.layouts] == [("b", "ep2", ())]
    _edit(lambda s: _swap(s, "linear_fc1.weight1", "linear_fc1.weight2"), "mp_rank_00_001", "mp_rank_01_001")(
        made / "release"
    )
    report = verify(tiny_folder("mixtral"), made, tokens=64, engine="megatron", layouts=parse_layouts("ep2"))
    assert not report.passed
