"""The fuzzer of benchmarks/fuzz.py on a small number of inputs, and shown to see every kind of defect."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptbridge.converters.errors import BadInputError, MismatchError, StorageError
from ckptbridge.converters.tensors import InMemory, Stored
from tests.converters import fuzz_judge
from tests.converters.fuzz_folders import Mutation, Special, mutate
from tests.converters.fuzz_judge import FINE, Watch, judge
from tests.converters.fuzz_sources import all_sources, read_folder
from tests.converters.fuzz_worker import Fuzzer
from tests.converters.running import ROOT

INPUTS = 330
SEED = 20


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Fuzzer:
    return Fuzzer(tmp_path_factory.mktemp("fuzz"), SEED)


@pytest.mark.parametrize("part", range(3))
def test_whatever_is_spoiled_is_refused_or_converted_rightly(part: int, fuzzer: Fuzzer) -> None:
    results = [fuzzer.run(number) for number in range(part, INPUTS, 3)]
    assert not [result for result in results if result["outcome"] not in FINE]
    outcomes = Counter(result["outcome"] for result in results)
    assert min(outcomes["refused"], outcomes["converted"]) > 10, outcomes


def test_every_source_is_converted_when_nothing_is_spoiled(fuzzer: Fuzzer) -> None:
    """Otherwise refusals would prove nothing; and the reference reader finds the same tensors."""
    for name, folder in fuzzer.folders.items():
        out = fuzzer.scratch / "sound"
        out.mkdir()
        verdict = judge(folder.path, out / "target", folder.source, fuzzer.watch)
        assert (verdict.outcome, verdict.told) == ("converted", ""), name
        for path in sorted(out.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        out.rmdir()


def test_an_input_follows_from_its_number(tmp_path: Path) -> None:
    sources = all_sources(tmp_path / "making")
    for name, source in sources.items():
        first, again = (mutate(source, random.Random(f"7/{name}")) for _ in range(2))
        assert first == again


class _Watched:
    """One planted defect of the converter, judged."""

    def __init__(self, fuzzer: Fuzzer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fuzzer, self.monkeypatch = fuzzer, monkeypatch

    def outcome(self, number: int = 0) -> str:
        self.monkeypatch.setattr(self.fuzzer, "draw", lambda n: (self.fuzzer.names[0], Mutation("nothing", {})))
        return self.fuzzer.run(number)["outcome"]


@pytest.fixture
def watched(fuzzer: Fuzzer, monkeypatch: pytest.MonkeyPatch) -> _Watched:
    return _Watched(fuzzer, monkeypatch)


def _raising(error: BaseException) -> object:
    def run(*_: object, **__: object) -> None:
        raise error

    return run


def test_it_sees_crashes_and_bad_messages(watched: _Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    assert watched.outcome() == "converted"
    for error, outcome in (
        (KeyError("x"), "CRASH"),
        (MemoryError(), "CRASH"),
        (RecursionError(), "CRASH"),
        (MismatchError("x"), "CRASH"),
        (OSError("x"), "CRASH"),
        (BadInputError("something is wrong somewhere"), "MESSAGE"),
        (BadInputError(str(watched.fuzzer.folders[watched.fuzzer.names[0]].path) + ": x"), "refused"),
        (StorageError(str(watched.fuzzer.folders[watched.fuzzer.names[0]].path) + ": x"), "storage"),
    ):
        monkeypatch.setattr(fuzz_judge, "open_model", _raising(error))
        assert watched.outcome() == outcome, error


def test_it_sees_wrong_bytes(watched: _Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Stored.read_rows
    plan = fuzz_judge.plan_conversion

    def spoiled(model: object, *arguments: object) -> object:
        for name, tensor in model.tensors.items():  # type: ignore[attr-defined]
            if name.endswith("final_layernorm.weight") and isinstance(tensor, Stored):
                model.tensors[name] = InMemory(read(tensor, 0, tensor.shape[0]) + 1)  # type: ignore[attr-defined]
        return plan(model, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(fuzz_judge, "plan_conversion", spoiled)
    assert watched.outcome() == "WRONG"


def test_it_sees_memory_and_escapes(watched: _Watched, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened = fuzz_judge.open_model

    def greedy(folder: Path) -> object:
        torch.ones(fuzz_judge.MAX_RAM + fuzz_judge.CONSTANT + (32 << 20), dtype=torch.uint8)
        return opened(folder)

    def escaping(folder: Path) -> object:
        (tmp_path / "elsewhere").write_text("x")
        return opened(folder)

    def running(folder: Path) -> object:
        subprocess.run([sys.executable, "-S", "-c", ""], check=True)
        return opened(folder)

    for wrong, outcome in ((greedy, "MEMORY"), (escaping, "ESCAPE"), (running, "ESCAPE")):
        monkeypatch.setattr(fuzz_judge, "open_model", wrong)
        assert watched.outcome() == outcome
    monkeypatch.setattr(fuzz_judge, "open_model", opened)
    assert watched.outcome() == "converted"


def test_the_watch_knows_where_writing_is_allowed(tmp_path: Path) -> None:
    watch = Watch()
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    watch.allowed = str(inside)
    (inside / "a").write_text("x")
    (inside / "a").rename(inside / "b")
    descriptor = os.open(inside, os.O_RDONLY)
    os.unlink("b", dir_fd=descriptor)
    os.close(descriptor)
    assert not watch.seen
    (outside / "a").write_text("x")
    (outside / "a").rename(inside / "a")
    (inside / "a").rename(outside / "a")
    (outside / "a").unlink()
    (outside / "d").mkdir()
    watch.allowed = None
    assert len(watch.seen) == 5, watch.seen


def _program() -> Any:
    spec = spec_from_file_location("fuzz_program", ROOT / "benchmarks" / "fuzz.py")
    assert spec is not None
    assert spec.loader is not None
    program = module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


def test_the_program_sees_a_hang_and_a_death_and_goes_on(tmp_path: Path) -> None:
    program = _program()
    program.WORKER = "tests.converters.fuzz_planted"
    lane = program.Lane(Namespace(n=5, seed=5, hang=1.0), 0, 1, tmp_path)
    lane.run(time.monotonic() + 100)
    outcomes = {result["i"]: result["outcome"] for result in lane.results}
    assert (outcomes.pop(1), outcomes.pop(2)) == ("HANG", "CRASH")
    assert set(outcomes) == {0, 3, 4}
    assert set(outcomes.values()) <= set(FINE)


def test_the_program_runs_and_tells_how_to_see_an_input(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "fuzz.py"), "--seed", "5"]
    done = subprocess.run([*command, "--n", "22"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "22 inputs in" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0, done.stdout
    subprocess.run([*command, "--show", "3"], cwd=tmp_path, capture_output=True, check=True)
    assert any((tmp_path / "fuzz-3").iterdir())


def test_what_an_input_changed_is_put_back(fuzzer: Fuzzer) -> None:
    folder = fuzzer.folders["hf safetensors"]
    for special in (Special("pipe"), Special("folder"), Special("link", "nowhere"), None, b"x"):
        mutation = Mutation("something", {"config.json": special, "new": b"y"})
        folder.apply(mutation)
        folder.restore(mutation)
        assert read_folder(folder.path) == folder.source.files
