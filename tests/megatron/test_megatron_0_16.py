"""megatron-core 0.16.1, which knows no `common_state` object yet: it loads what we write, and we read its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import open_model
from tests.conftest import TinyFolders
from tests.fetch_megatron import OLDER
from tests.megatron.cases import layout_for, load_case, save_case, to_megatron
from tests.megatron.conftest import Cases, Done, Report
from tests.megatron.launch import Layout, Load, Save, check_fetched, launch
from tests.tiny import VOCAB_SIZE, reference_logits, token_ids

pytestmark = [pytest.mark.mcore, pytest.mark.xdist_group("megatron")]

TOLERANCE = 1e-5
LAYOUTS = {
    "llama": (Layout(), Layout(tp=2, pp=2)),
    "mixtral": (Layout(ep=2), Layout(tp=2, ep=2, etp=2)),
    "qwen2_moe": (Layout(tp=2), Layout(pp=2, ep=2)),
}
TARGETS: dict[str, tuple[int, int] | None] = {"default": None, "0.16": (0, 16)}
LOADS = [(model, target, layout) for model in LAYOUTS for target in TARGETS for layout in LAYOUTS[model]]


@pytest.fixture(scope="module")
def older(tiny_folder: TinyFolders, tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """By ("load", model, target, layout), ("too new",) and ("save", model): one job on the older megatron-core."""
    check_fetched(OLDER.folder)
    root = tmp_path_factory.mktemp("megatron-0.16")
    cases: dict[tuple[str, ...], Load | Save] = {}
    for model, layouts in LAYOUTS.items():
        hf = tiny_folder(model)
        expected = reference_logits(hf, token_ids())
        for target, version in TARGETS.items():
            options = ConvertOptions(layout=layout_for(model), target_mcore=version)
            converted = to_megatron(hf, root / f"{model}-{target}", options)
            for layout in layouts:
                case = load_case(converted, hf, layout, expected)
                cases["load", model, target, str(layout)] = replace(case, default_strictness=True)
        cases["save", model] = save_case(hf, root / f"{model}-saved", layouts[1])
    options = ConvertOptions(layout=layout_for("llama"), target_mcore=(0, 19))
    too_new = to_megatron(tiny_folder("llama"), root / "too-new", options)
    case = load_case(too_new, tiny_folder("llama"), Layout(), reference_logits(tiny_folder("llama"), token_ids()))
    cases["too new",] = replace(case, default_strictness=True)
    results = launch(list(cases.values()), OLDER.folder)
    return {key: Done(case, result) for (key, case), result in zip(cases.items(), results, strict=True)}


@pytest.mark.parametrize(("model", "target", "layout"), LOADS, ids=str)
def test_what_is_written_for_it_and_by_default_loads(
    older: Cases, record_property: Report, model: str, target: str, layout: Layout
) -> None:
    result = older["load", model, target, str(layout)].result
    assert not result.error, result.error
    assert result.max_abs_diff is not None
    record_property("max_abs_diff", result.max_abs_diff)
    assert result.max_abs_diff <= TOLERANCE


def test_files_for_it_alone_hold_one_common_state(older: Cases) -> None:
    """A newer megatron-core prefers `common.pt`, so the object would be dead weight."""
    for_it, default = (older["load", "llama", target, "tp1"].case.folder for target in ("0.16", "default"))
    holds = {folder: b"common_state" in (folder / ".metadata").read_bytes() for folder in (for_it, default)}
    assert holds == {for_it: False, default: True}
    assert (for_it / "common.pt").exists()
    assert (default / "common.pt").exists()


def test_what_is_written_for_0_19_does_not_load(older: Cases) -> None:
    assert not (older["too new",].case.folder / "common.pt").exists()
    assert older["too new",].result.error


@pytest.mark.parametrize("model", LAYOUTS)
def test_what_it_saved_is_read(
    older: Cases, record_property: Report, tiny_folder: TinyFolders, tmp_path: Path, model: str
) -> None:
    saved = older["save", model]
    assert not saved.result.error, saved.result.error
    folder = saved.case.folder / "iter_0000007"
    assert (folder / "common.pt").exists()
    assert b"common_state" not in (folder / ".metadata").read_bytes()
    source = open_model(saved.case.folder, hf_config=tiny_folder(model))
    assert source.iteration == 7
    execute(plan_conversion(source, tmp_path / "hf", "hf"))
    assert saved.result.logits is not None
    difference = reference_logits(tmp_path / "hf", saved.case.tokens) - saved.result.logits[..., :VOCAB_SIZE]
    record_property("max_abs_diff", difference.abs().max().item())
    assert difference.abs().max().item() <= TOLERANCE


@pytest.mark.parametrize("model", LAYOUTS)
def test_its_arguments_alone_describe_what_it_saved(older: Cases, model: str) -> None:
    source = open_model(older["save", model].case.folder)
    assert source.family.name == model
