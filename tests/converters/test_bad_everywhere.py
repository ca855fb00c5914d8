"""Every format, spoiled by rule: each case is refused with the file's name, and nothing is written anywhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ckptbridge.cli import app
from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import open_model
from ckptbridge.converters.reshard import plan_reshard
from tests.converters.fuzz_judge import Watch
from tests.converters.fuzz_pickles import RUNS_CODE, alone
from tests.converters.fuzz_sources import Source, all_sources
from tests.converters.hostile_everywhere import Spoiled, bad_json, bombs, cuts, hostile_index, read_files, with_pickle
from tests.converters.running import ROOT

FORMATS = (
    *("hf safetensors", "hf safetensors, sharded", "hf .bin", "hf .bin, sharded", "hf fp8 in blocks"),
    *("torch_dist", "torch_dist without config.json", "torch_dist with layers in keys"),
    *("legacy", "legacy, oldest names", "fsdp_dtensor", "torch_dist with an optimizer", "legacy with an optimizer"),
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    made = all_sources(tmp_path_factory.mktemp("making") / "x")
    assert set(made) == set(FORMATS)
    return made


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


def written(source: Source, folder: Path) -> Path:
    for name, data in source.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def carry_out(source: Source, file: str, folder: Path, target: Path) -> None:
    """The conversion that reads this file: the optimizer's only when a checkpoint is given another layout."""
    if file.endswith("distrib_optim.pt"):
        execute(plan_reshard(open_model(folder), target, "torch_dist"))
    else:
        execute(plan_conversion(open_model(folder), target, source.to))  # type: ignore[arg-type]


def assert_all_refused(source: Source, cases: Iterable[Spoiled], root: Path, watch: Watch) -> int:
    """Each case by itself: refused, told with the file's name, and nothing written but below the target's folder."""
    folder, out = written(source, root / "source"), root / "out"
    out.mkdir()
    count = 0
    for case in cases:
        for name, data in case.changes.items():
            (folder / name).write_bytes(data)
        watch.seen, watch.allowed = [], str(out)
        try:
            with pytest.raises(BadInputError) as refused:
                carry_out(source, case.file, folder, out / "target")
        except pytest.fail.Exception:
            pytest.fail(f"{case.told} was not refused")
        finally:
            watch.allowed = None
        for word in (case.file, *case.words):
            assert word in str(refused.value), f"{case.told}: {word!r} is not in: {refused.value}"
        assert len(str(refused.value)) < 7000, case.told
        assert not watch.seen, (case.told, watch.seen)
        assert not (out / "target").exists(), case.told
        for left in out.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        for name in case.changes:
            (folder / name).write_bytes(source.files[name])
        count += 1
    return count


@pytest.mark.parametrize("name", FORMATS)
def test_every_file_cut_at_every_boundary(name: str, sources: dict[str, Source], tmp_path: Path, watch: Watch) -> None:
    source = sources[name]
    assert assert_all_refused(source, cuts(source), tmp_path, watch) > 20


@pytest.mark.parametrize("name", FORMATS)
def test_every_json_file(name: str, sources: dict[str, Source], tmp_path: Path, watch: Watch) -> None:
    source = sources[name]
    count = assert_all_refused(source, (*bad_json(source), *hostile_index(source)), tmp_path, watch)
    assert count or not [file for file in read_files(source) if file.endswith(".json")]


@pytest.mark.parametrize("name", [name for name in FORMATS if "safetensors" not in name and "fp8" not in name])
def test_every_pickle_that_asks_for_code(name: str, sources: dict[str, Source], tmp_path: Path, watch: Watch) -> None:
    source = sources[name]
    cases = [case for body in RUNS_CODE.values() for case in with_pickle(source, alone(body))]
    assert assert_all_refused(source, cases, tmp_path, watch) >= len(RUNS_CODE)
    assert not Path("ckptbridge-was-here").exists()


@pytest.mark.parametrize("name", [name for name in FORMATS if "safetensors" not in name and "fp8" not in name])
def test_every_archive_that_explodes(name: str, sources: dict[str, Source], tmp_path: Path, watch: Watch) -> None:
    assert assert_all_refused(sources[name], bombs(sources[name]), tmp_path, watch)


def test_the_cases_are_refused_for_what_is_spoiled(sources: dict[str, Source], tmp_path: Path) -> None:
    """Every source is sound before."""
    for name, source in sources.items():
        folder = written(source, tmp_path / name)
        plan_conversion(open_model(folder), tmp_path / "target", source.to)  # type: ignore[arg-type]


Change = Callable[[Path], None]


def _link(name: str, to: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(to)

    return change


def _special(name: str, make: Callable[[Path], object]) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_no_file_is_refused_and_never_waited_for(name: str, sources: dict[str, Source], tmp_path: Path) -> None:
    """A pipe that nobody feeds, a device that never ends, a folder, links into nothing and in a circle."""
    source = sources[name]
    for number, file in enumerate(read_files(source)):
        for told, change in {
            "pipe": _special(file, os.mkfifo),
            "folder": _special(file, Path.mkdir),
            "zeros": _link(file, "/dev/zero"),
            "nowhere": _link(file, "nowhere"),
            "circle": _link(file, file.split("/")[-1]),
        }.items():
            folder = written(source, tmp_path / f"{number}-{told}")
            change(folder)
            try:
                carry_out(source, file, folder, tmp_path / "target")
            except BadInputError as refused:
                assert str(folder) in str(refused), told  # noqa: PT017
                assert not (tmp_path / "target").exists()
            else:  # what is not there may not be needed: args stand in common_state too, a config in the args
                assert file.endswith(("common.pt", "hf/config.json")), (file, told)
                shutil.rmtree(tmp_path / "target")
            shutil.rmtree(folder)


def test_a_snapshot_of_links_is_read_as_the_hub_makes_it(sources: dict[str, Source], tmp_path: Path) -> None:
    """Links that lead out of the folder are how a cache looks; an index that does is not."""
    source = sources["hf safetensors, sharded"]
    blobs, folder = written(source, tmp_path / "blobs"), tmp_path / "snapshot"
    folder.mkdir()
    for name in source.files:
        (folder / name).symlink_to(blobs / name)
    execute(plan_conversion(open_model(folder), tmp_path / "target", source.to))  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [1, 3, 5, 8])
def test_experts_that_disagree_with_the_router(rows: int, sources: dict[str, Source], tmp_path: Path) -> None:
    source = sources["hf safetensors, sharded"]
    folder = written(source, tmp_path / "source")
    name = "model.layers.1.mlp.gate.weight"
    file = next(f for f in sorted(folder.glob("*.safetensors")) if name in load_file(f))
    save_file(load_file(file) | {name: torch.ones(rows, 8, dtype=torch.bfloat16)}, file, {"format": "pt"})
    with pytest.raises(BadInputError) as refused:
        open_model(folder)
    for word in (name, "[4, 8]", f"[{rows}, 8]"):
        assert word in str(refused.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_carried_told_and_refused_when_asked(
    value: float, sources: dict[str, Source], tmp_path: Path
) -> None:
    folder = written(sources["hf safetensors"], tmp_path / "source")
    held, name = load_file(folder / "model.safetensors"), "model.layers.0.mlp.up_proj.weight"
    held[name][2, 3] = value
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    target = tmp_path / "target"
    with pytest.raises(BadInputError) as refused:
        execute(plan_conversion(open_model(folder), target, "torch_dist", ConvertOptions(check_finite=True)))
    assert name in str(refused.value)
    assert not target.exists()
    receipt = execute(plan_conversion(open_model(folder), tmp_path / "other", "torch_dist"))
    assert sum(receipt.not_finite[name].values()) == 1
    assert any(name in note for note in receipt.notes)
    execute(plan_conversion(open_model(tmp_path / "other"), tmp_path / "back", "hf"))
    back = load_file(tmp_path / "back" / "model.safetensors")[name]
    assert back.view(torch.int32).tolist() == held[name].view(torch.int32).tolist()


def _sample(source: Source) -> list[Spoiled]:
    """A case of every kind."""
    kinds = [
        list(cuts(source))[::17],
        list(bad_json(source))[::5],
        list(bombs(source)),
        list(hostile_index(source))[:3],
    ]
    pickles = list(with_pickle(source, alone(RUNS_CODE["asks for os.system"])))
    return [case for cases in (*kinds, pickles) for case in cases if "distrib_optim" not in case.file]


@pytest.mark.parametrize("name", FORMATS)
def test_the_command_line_refuses_with_exit_code_3_and_a_sentence(
    name: str, sources: dict[str, Source], tmp_path: Path
) -> None:
    source, runner = sources[name], CliRunner()
    folder, target = written(source, tmp_path / "source"), tmp_path / "target"
    verb = "mcore2hf" if source.to == "hf" else "hf2mcore"
    for case in _sample(source):
        for file, data in case.changes.items():
            (folder / file).write_bytes(data)
        done = runner.invoke(app, [verb, str(folder), str(target)])
        assert done.exit_code == 3, (case.told, done.exit_code, done.output[-500:])
        assert case.file in done.output.replace("\n", ""), case.told
        assert "Traceback" not in done.output, case.told
        assert not target.exists(), case.told
        looked = runner.invoke(app, ["inspect", str(folder)])
        assert looked.exit_code in (0, 3), (case.told, looked.output[-500:])
        assert "Traceback" not in looked.output, case.told
        for left in tmp_path.glob("target*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        for file in case.changes:
            (folder / file).write_bytes(source.files[file])


@pytest.mark.parametrize("name", ["hf .bin", "torch_dist"])
def test_the_program_refuses_with_exit_code_3_and_a_sentence(
    name: str, sources: dict[str, Source], tmp_path: Path
) -> None:
    """As a process of its own, without the test's hold on its streams."""
    source = sources[name]
    folder = written(source, tmp_path / "source")
    case = list(with_pickle(source, alone(RUNS_CODE["asks for os.system"])))[0]  # noqa: RUF015
    for file, data in case.changes.items():
        (folder / file).write_bytes(data)
    verb = "mcore2hf" if source.to == "hf" else "hf2mcore"
    command = [sys.executable, "-m", "ckptbridge", verb, str(folder), str(tmp_path / "target")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "os.system" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_target_that_cannot_be_written_is_exit_code_4(sources: dict[str, Source], tmp_path: Path) -> None:
    folder = written(sources["hf safetensors"], tmp_path / "source")
    (tmp_path / "file").write_text("in the way")
    for target in (tmp_path / "file" / "target", Path("/proc/nowhere/target"), tmp_path / ("x" * 300)):
        done = CliRunner().invoke(app, ["hf2mcore", str(folder), str(target)])
        assert done.exit_code == 4, (target, done.output)
        assert "Traceback" not in done.output
