"""One pass over the source: what is made of the same bytes is written together, and nothing is read twice."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.copying import Copier
from ckptbridge.converters.drafts import in_source_order
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import open_model
from ckptbridge.converters.output import OutputFile, Piece
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.tasks import MOST_FILES, bundles_of, leaves, tasks_of
from ckptbridge.converters.tensors import (
    Beside,
    Extent,
    LazyTensor,
    Stored,
    Zeros,
    cast,
    columns,
    join_columns,
    join_rows,
    rows,
    scaled,
)
from ckptbridge.converters.upcycling.construction import upcycled
from ckptbridge.converters.upcycling.spec import UpcycleSpec
from tests.conftest import TinyFolders
from tests.converters.crashing import digests
from tests.converters.running import ROOT, planned
from tests.converters.sizable import write_sizable
from tests.tiny import TINY


def matrix(number: int = 0, shape: tuple[int, ...] = (8, 8)) -> Stored:
    return Stored(Path(f"/file{number}"), 0, shape, torch.bfloat16)


def output(name: str, *tensors: LazyTensor) -> OutputFile:
    return OutputFile(name, 0, [Piece(f"{name}.{i}", 0, tensor) for i, tensor in enumerate(tensors)])


def test_the_stored_tensors_of_any_composition_are_found() -> None:
    a, b = matrix(1), matrix(2)
    assert list(leaves(a)) == [a]
    assert list(leaves(Zeros((8, 8), torch.bfloat16))) == []
    made = join_rows(
        [scaled(cast(columns(a, 0, 4), torch.float32), 2.0), join_columns([cast(b, torch.float32)] * 2)][:1]
    )
    assert list(leaves(made)) == [a]
    both = join_columns([join_rows([rows(a, 0, 4), rows(b, 0, 4)]), b])
    assert isinstance(both, Beside)
    assert list(leaves(both)) == [a, b]


def test_pieces_of_one_matrix_are_one_task_and_others_are_not() -> None:
    a, b, c = matrix(1), matrix(2), matrix(3)
    files = [output("x", columns(a, 0, 4), b), output("y", columns(a, 4, 8), join_rows([c, rows(b, 0, 2)]), c)]
    tasks = tasks_of(files)
    found = [[(number, piece.name) for outlet in task for number, piece in outlet.places] for task in tasks]
    assert found == [[(0, "x.0"), (1, "y.0")], [(0, "x.1"), (1, "y.1"), (1, "y.2")]]
    again = tasks_of([output("x", a, b, a)])
    assert [[len(outlet.places) for outlet in task] for task in again] == [[2], [1]]  # one tensor, two places


def test_files_that_share_much_are_bundled_and_others_are_not() -> None:
    layers = [matrix(i) for i in range(6)]
    ranks = [
        [
            output(
                f"{rank}_{part}", *(columns(layer, 2 * rank, 2 * rank + 2) for layer in layers[3 * part : 3 * part + 3])
            )
            for part in range(2)
        ]
        for rank in range(4)
    ]
    files = [ranks[rank][part] for part in range(2) for rank in range(4)]
    assert [[file.name for file in bundle] for bundle in bundles_of(files)] == [
        [f"{rank}_{part}" for rank in range(4)] for part in range(2)
    ]
    assert max(len(bundle) for bundle in bundles_of(files, most=2)) == 2
    assert [len(bundle) for bundle in bundles_of([output("x", *layers[:3]), output("y", *layers[3:])])] == [1, 1]
    neighbours = [output("x", *layers[:3], rows(layers[3], 0, 4)), output("y", rows(layers[3], 4, 8), *layers[4:])]
    assert [len(bundle) for bundle in bundles_of(neighbours)] == [1, 1]  # one matrix across the border is little
    wide = matrix(9, (8, 128))
    assert (
        max(len(bundle) for bundle in bundles_of([output(str(i), columns(wide, i, i + 1)) for i in range(64)]))
        == MOST_FILES
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sizable(tmp_path_factory.mktemp("sizable") / "llama")


READING = """
import json, sys
from pathlib import Path
import torch
import ckptbridge.converters.execute as execution
from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.model import open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.upcycling.construction import upcycled
from ckptbridge.converters.upcycling.spec import UpcycleSpec

def nbytes_read():
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])

told = json.loads(sys.argv[1])
model = open_model(Path(told["source"]))
if "upcycle" in told:
    model = upcycled(model, UpcycleSpec(**told["upcycle"]))
layout = ParallelLayout(**told.get("layout", {}))
options = ConvertOptions(layout=layout, dtype=getattr(torch, told.get("dtype", ""), None))
execution.MOST_FILES = told.get("most_files", execution.MOST_FILES)
plan = plan_conversion(model, Path(told["target"]), told["to"], options)
before = nbytes_read()
receipt = execution.execute(plan)
print(json.dumps({"read": nbytes_read() - before, "source": receipt.source_nbytes, "target": receipt.target_nbytes}))
"""


def times_read(source: Path, target: Path, to: str = "torch_dist", **told: Any) -> float:
    """The bytes that the system says a conversion read, over the bytes of its source."""
    told |= {"source": str(source), "target": str(target), "to": to}
    command = [sys.executable, "-c", READING, json.dumps(told)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    counted = json.loads(done.stdout)
    return counted["read"] / counted["source"]


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"layout": {"tp": 8}},
        {"layout": {"tp": 2, "pp": 3}},
        {"layout": {"tp": 8}, "dtype": "float16"},
        {"to": "hf"},
        {"to": "hf", "upcycle": {"num_experts": 8, "topk": 2}},
        {"to": "torch_dist", "upcycle": {"num_experts": 16, "topk": 4, "granularity": 4}, "layout": {"ep": 4}},
    ],
    ids=str,
)
def test_every_byte_of_the_source_is_read_once(told: dict[str, Any], source: Path, tmp_path: Path) -> None:
    """Digests of both sides included; 5 % are for headers, pickles and the process's own files."""
    assert 0.99 < times_read(source, tmp_path / "target", **told) < 1.05


@pytest.mark.parametrize("layout", [{}, {"tp": 8}, {"tp": 2, "pp": 3}], ids=str)
def test_every_byte_is_read_once_on_the_way_back(layout: dict[str, int], source: Path, tmp_path: Path) -> None:
    """Each chunk is an archive of its own, whose directory is looked for in the last 4 KiB."""
    there = execute(planned(source, tmp_path / "mcore", layout=ParallelLayout(**layout)))
    directories = 4500 * len(there.target_tensors) / there.target_nbytes
    assert 0.99 < times_read(tmp_path / "mcore", tmp_path / "hf", "hf") < 1.02 + directories


def test_the_count_shows_what_is_read_again(source: Path, tmp_path: Path) -> None:
    """Files that are written one after another each read the matrix that they share."""
    told = {"source": str(source), "target": str(tmp_path / "it"), "to": "torch_dist", "layout": {"tp": 8}}
    assert times_read(**told, most_files=1) > 1.5


@pytest.mark.parametrize("name", TINY)
def test_workers_and_bundles_do_not_change_a_byte(name: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    made: list[Any] = []
    for number, (workers, max_ram) in enumerate(itertools.product((1, 3), (1 << 20, 1 << 30))):
        options: dict[str, Any] = {"workers": workers, "max_ram": max_ram, "dtype": torch.bfloat16}
        target = tmp_path / str(number) / "target"
        execute(planned(tiny_folder(name), target, layout=ParallelLayout(tp=2), **options))
        made.append(digests(target))
    assert made[0] is not None
    assert all(one == made[0] for one in made[1:])


def test_copies_of_an_expert_are_computed_once(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    dense = open_model(tiny_folder("llama"))
    sparse = upcycled(dense, UpcycleSpec(num_experts=8, topk=2))
    plan = plan_conversion(sparse, tmp_path / "target", "hf", ConvertOptions(workers=1))
    outlets = [outlet for task in tasks_of(plan.files) for outlet in task]
    assert sum(len(outlet.places) == 8 for outlet in outlets) >= dense.config.num_layers


def test_torchs_threads_are_as_they_were(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    copier = Copier(tmp_path, workers=2, max_ram=1 << 24, progress=None, total=0)
    seen: list[int] = []
    copier.run([lambda: seen.append(torch.get_num_threads())] * 4)
    assert set(seen) == {1}
    assert torch.get_num_threads() == before


def test_a_failure_ends_the_other_workers(tmp_path: Path) -> None:
    copier = Copier(tmp_path, workers=2, max_ram=1 << 24, progress=None, total=0)

    def fail() -> None:
        time.sleep(0.1)
        raise KeyError("first")

    def go_on() -> None:
        while True:
            copier.advance(1)
            time.sleep(0.001)

    with pytest.raises(KeyError, match="first"):
        copier.run([go_on, fail])


def test_extents_in_the_sources_order_leave_each_tensors_own_order() -> None:
    path = Path("/source")

    def run(*tensors: list[int]) -> list[tuple[str, int]]:
        moved: Any = [(str(i), [Extent(path, at, 4) for at in offsets]) for i, offsets in enumerate(tensors)]
        return [(stream, extent.offset) for stream, extent in in_source_order(moved)]

    assert run([0, 8], [4, 12]) == [("0", 0), ("1", 4), ("0", 8), ("1", 12)]
    assert run([8, 0], [4, 12]) == [("0", 8), ("0", 0), ("1", 4), ("1", 12)]  # the first wants it so
