"""One session, one job: every case on real megatron-core ranks, run before the first test that asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ckptbridge.converters.convert import ConvertOptions
from tests.conftest import TinyFolders
from tests.megatron.cases import (
    FAULTS,
    LOADS,
    SAVES,
    VARIANTS,
    fault_case,
    layout_for,
    load_case,
    mislabelled_case,
    save_case,
    to_megatron,
    variant_case,
)
from tests.megatron.launch import Layout, Load, Result, Save, check_fetched, launch
from tests.tiny import TINY, reference_logits, token_ids


@dataclass(frozen=True, slots=True)
class Done:
    """A case that was run, and its result."""

    case: Load | Save
    result: Result


Cases = dict[tuple[str, ...], Done]
Report = Callable[[str, object], None]


@pytest.fixture(scope="session")
def megatron(tiny_folder: TinyFolders, tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """By ("load", model, layout), ("variant", name), ("fault", name), ("mislabelled",), ("save", model, layout) and
    ("save local names",).
    """
    check_fetched()
    root = tmp_path_factory.mktemp("megatron")
    cases: dict[tuple[str, ...], Load | Save] = {}
    converted = {
        name: to_megatron(tiny_folder(name), root / name, ConvertOptions(layout=layout_for(name))) for name in TINY
    }
    expected = {name: reference_logits(tiny_folder(name), token_ids()) for name in TINY}
    for name, layout in LOADS:
        case = load_case(converted[name], tiny_folder(name), layout, expected[name])
        cases["load", name, str(layout)] = case
    for name in VARIANTS:
        cases["variant", name] = variant_case(name, _new(root / name))
    for name, fault in FAULTS.items():
        cases["fault", name] = fault_case(name, tiny_folder(fault.model), _new(root / name))
    cases["mislabelled",] = mislabelled_case(
        converted["llama"], tiny_folder("llama"), root / "mislabelled", expected["llama"]
    )
    for name, layout in SAVES:
        cases["save", name, str(layout)] = save_case(tiny_folder(name), root / f"saved-{name}-{layout}", layout)
    moe = tiny_folder("qwen3_moe")
    cases["save local names",] = save_case(moe, root / "saved-local-names", Layout(tp=2), local_names=True)
    results = launch(list(cases.values()))
    return {key: Done(case, result) for (key, case), result in zip(cases.items(), results, strict=True)}


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print every measured logit difference: what the tolerances and the faults' threshold rest on."""
    differences = {
        report.nodeid: value
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        for key, value in report.user_properties
        if key == "max_abs_diff" and report.when == "call"
    }
    if differences:
        terminalreporter.section("max abs difference of fp32 logits")
        groups: dict[str, list[tuple[float, str]]] = {}
        for nodeid, difference in differences.items():
            test, _, parameters = nodeid.rpartition("::")[2].partition("[")
            model, _, layout = parameters.rstrip("]").partition("-")
            groups.setdefault(f"{test} {model}", []).append((difference, layout))
        for group, entries in groups.items():
            largest, layout = max(entries)
            of = f" (largest of {len(entries)}, {layout})" if len(entries) > 1 else ""
            terminalreporter.line(f"{largest:.1e}  {group}{of}")
