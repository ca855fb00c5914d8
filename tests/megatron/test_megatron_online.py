"""Upcycling while megatron-core loads: every rank reads its own part of the dense files, and no mixture is written."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TinyFolders
from tests.megatron.launch import Layout, check_fetched, run_worker
from tests.tiny import reference_logits, token_ids

pytestmark = pytest.mark.xdist_group("megatron")

TOLERANCE = 1e-5
SPECS: dict[str, dict[str, Any]] = {
    "copies": {"num_experts": 8, "topk": 2},
    "groups": {"num_experts": 8, "topk": 4, "granularity": 4, "permute": True},
    "shared": {"num_experts": 4, "topk": 2, "granularity": 2, "shared": "partition"},
    "sigmoid groups": {
        **{"num_experts": 8, "topk": 4, "granularity": 2, "router": "sigmoid", "router_groups": True, "to": "glm4_moe"}
    },
    "layers": {"num_experts": 4, "layers": "1::2"},
}
RUNS = (
    ("llama", "copies", Layout(ep=2)),
    ("llama", "copies", Layout(tp=2, ep=2)),
    ("llama", "groups", Layout(tp=2, ep=2, etp=2)),
    ("llama", "groups", Layout(pp=2, ep=2)),
    ("llama_tied", "groups", Layout(tp=2, pp=2)),
    ("qwen2", "shared", Layout(tp=2, ep=2)),
    ("llama", "sigmoid groups", Layout(ep=4)),
    ("qwen3", "layers", Layout(pp=2, ep=2)),
)
FAULT = ("llama", "groups", Layout(tp=2, ep=2, etp=2))


def _name(run: tuple[str, str, Layout]) -> str:
    return f"{run[0]}, {run[1]}, {run[2]}"


@pytest.fixture(scope="module")
def differences(tiny_folder: TinyFolders, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Of each run the largest difference over the largest |logit|; the fault's under "fault"."""
    check_fetched()
    folder = tmp_path_factory.mktemp("online")
    expected = {name: reference_logits(tiny_folder(name), token_ids()) for name, _, _ in RUNS}
    for name, logits in expected.items():
        torch.save(logits, folder / f"{name}.pt")
    wanted = {_name(run): (run, False) for run in RUNS} | {"fault": (FAULT, True)}
    cases = {
        key: {
            "folder": str(tiny_folder(name)),
            "spec": SPECS[kind],
            "layout": asdict(layout),
            "token_ids": token_ids().tolist(),
            "expected": str(folder / f"{name}.pt"),
            "fault": is_fault,
            "out": str(folder / f"{number}.json"),
        }
        for number, (key, ((name, kind, layout), is_fault)) in enumerate(wanted.items())
    }
    before = {path for name in expected for path in tiny_folder(name).rglob("*")}
    ordered = sorted(cases.values(), key=lambda case: json.dumps(case["layout"]))
    done = run_worker("online_worker.py", ordered, folder, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    assert before == {path for name in expected for path in tiny_folder(name).rglob("*")}
    assert not list(folder.rglob("*.distcp"))
    found = {key: json.loads(Path(case["out"]).read_text())["max_abs_diff"] for key, case in cases.items()}
    return {key: value / expected[wanted[key][0][0]].abs().max().item() for key, value in found.items()}


@pytest.mark.parametrize("run", RUNS, ids=_name)
def test_ranks_that_upcycle_while_they_load_compute_the_dense_function(
    run: tuple[str, str, Layout], differences: dict[str, float]
) -> None:
    assert differences[_name(run)] <= TOLERANCE


def test_the_comparison_sees_another_ranks_part(differences: dict[str, float]) -> None:
    assert differences["fault"] > 100 * TOLERANCE
