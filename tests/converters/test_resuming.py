"""An interrupted conversion goes on to the same bytes, or says why it cannot."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptbridge.converters.convert import ConversionPlan, ConvertOptions, plan_conversion
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.execute import execute, journal_file, partial_folder
from ckptbridge.converters.model import open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.upcycling.construction import upcycled
from ckptbridge.converters.upcycling.spec import UpcycleSpec
from tests.conftest import TinyFolders
from tests.converters.crashing import digests
from tests.converters.hostile import edit_json
from tests.converters.running import SMALL, begin, planned


def test_an_interrupted_run_says_how_to_go_on(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    target = tmp_path / "target"
    partial = begin(planned(tiny_folder("llama"), target))
    with pytest.raises(BadInputError, match="--resume") as refused:
        execute(planned(tiny_folder("llama"), target))
    assert str(partial) in str(refused.value)
    with pytest.raises(BadInputError, match="--resume"):
        open_model(partial)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("to", ["torch_dist", "hf"])
def test_a_resumed_run_ends_with_the_same_bytes(
    to: str, share: float, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    source = tiny_folder("qwen2_moe")
    execute(planned(source, tmp_path / "fresh", to))
    partial = begin(planned(source, tmp_path / "target", to), share)
    finished = journal_file(tmp_path / "target").read_text().splitlines()[1:]
    stamps = {json.loads(line)["file"]: (partial / json.loads(line)["file"]).stat().st_mtime_ns for line in finished}
    execute(planned(source, tmp_path / "target", to, resume=True, workers=3, max_ram=1 << 22))
    assert digests(tmp_path / "target") == digests(tmp_path / "fresh")
    assert (share == 0.01) == (not stamps)
    for name, stamp in stamps.items():  # what was finished was not written again
        assert (tmp_path / "target" / name).stat().st_mtime_ns == stamp


def test_resuming_nothing_is_a_plain_run_and_overwriting_begins_anew(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = tiny_folder("llama")
    execute(planned(source, tmp_path / "fresh", resume=True))
    partial = begin(planned(source, tmp_path / "target"))
    (partial / "litter").write_text("x")
    execute(planned(source, tmp_path / "target", overwrite=True))
    assert digests(tmp_path / "target") == digests(tmp_path / "fresh")


def _changed_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "change",
    [
        _changed_weights,
        lambda folder: edit_json(folder / "config.json", rms_norm_eps=1e-6),
        lambda folder: edit_json(folder / "generation_config.json", max_length=9),
    ],
    ids=["weights", "config", "asset"],
)
def test_resuming_from_a_changed_source_is_refused(
    change: Callable[[Path], None], tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_folder("llama"), source)
    begin(planned(source, tmp_path / "target"))
    change(source)
    with pytest.raises(BadInputError, match="another source"):
        execute(planned(source, tmp_path / "target", resume=True))
    assert not (tmp_path / "target").exists()
    execute(planned(source, tmp_path / "target", overwrite=True))


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16},
        {"layout": ParallelLayout(tp=2)},
        {"layout": ParallelLayout(pp=2)},
        {"layout": ParallelLayout(ep=2)},
        {"per_layer_keys": True},
        {"max_file_size": 90_000},
        {"target_mcore": (0, 16)},
    ],
    ids=str,
)
def test_resuming_with_other_options_is_refused(
    options: dict[str, Any], tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    source = tiny_folder("mixtral")
    begin(planned(source, tmp_path / "target"))
    with pytest.raises(BadInputError, match="other options"):
        execute(planned(source, tmp_path / "target", resume=True, **options))


@pytest.mark.parametrize("change", [{"seed": 1}, {"router_std": 0.5}, {"topk": 3}], ids=str)
def test_resuming_another_upcycling_is_refused(
    change: dict[str, Any], tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    """The names and shapes are the same; the values are not."""
    dense, target = open_model(tiny_folder("llama")), tmp_path / "target"
    spec = {"num_experts": 4, "topk": 2, "seed": 0}
    options = ConvertOptions(**SMALL)
    begin(plan_conversion(upcycled(dense, UpcycleSpec(**spec)), target, "torch_dist", options))
    other = upcycled(dense, UpcycleSpec(**spec | change))
    with pytest.raises(BadInputError, match="another source or with other options"):
        execute(plan_conversion(other, target, "torch_dist", ConvertOptions(**SMALL, resume=True)))


def test_resuming_with_another_given_config_is_refused(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    """The config lies outside the source; what it says goes into the files that are finished."""
    source, given = tmp_path / "source", tmp_path / "config.json"
    execute(planned(tiny_folder("llama"), source))
    shutil.rmtree(source / "hf")
    shutil.copy(tiny_folder("llama") / "config.json", given)

    def plan(**options: Any) -> ConversionPlan:
        model = open_model(source, hf_config=given)
        return plan_conversion(model, tmp_path / "target", "torch_dist", ConvertOptions(**SMALL, **options))

    begin(plan())
    edit_json(given, max_position_embeddings=999, eos_token_id=77)
    with pytest.raises(BadInputError, match="another source or with other options"):
        execute(plan(resume=True))


def test_a_torn_journal_costs_work_but_not_the_result(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    """Wherever the last line was cut off: what it told is done again."""
    source = tiny_folder("llama")
    execute(planned(source, tmp_path / "fresh"))
    partial = begin(planned(source, tmp_path / "begun"), 0.9)
    journal = journal_file(tmp_path / "begun").read_bytes()
    lines = journal.splitlines(keepends=True)
    assert len(lines) > 3
    last = len(journal) - len(lines[-1])
    cuts = {
        last,
        last + 1,
        last + 20,
        *(last + i + 1 for i, b in enumerate(lines[-1]) if b in b'}"{:'),
        len(journal) - 1,
    }
    target = tmp_path / "target"
    for cut in sorted(cuts):
        shutil.copytree(partial, partial_folder(target))
        journal_file(target).write_bytes(journal[:cut])
        execute(planned(source, target, resume=True))
        assert digests(target) == digests(tmp_path / "fresh"), f"cut at {cut}"
        shutil.rmtree(target)


def test_a_journal_that_was_torn_can_be_torn_again(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    """Killed amid a line, resumed, interrupted, resumed: the second line stands behind half of the first."""
    source, target = tiny_folder("llama"), tmp_path / "target"
    execute(planned(source, tmp_path / "fresh"))
    begin(planned(source, target), 0.5)
    journal = journal_file(target).read_bytes()
    journal_file(target).write_bytes(journal[:-10])
    begin(planned(source, target, resume=True), 0.9)
    execute(planned(source, target, resume=True))
    assert digests(target) == digests(tmp_path / "fresh")


@pytest.mark.parametrize("damage", ["removed", "cut", "grown"])
def test_a_finished_file_that_is_not_whole_any_more_is_written_again(
    damage: str, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    source, target = tiny_folder("llama"), tmp_path / "target"
    execute(planned(source, tmp_path / "fresh"))
    partial = begin(planned(source, target), 0.8)
    file = partial / json.loads(journal_file(target).read_text().splitlines()[1])["file"]
    data = file.read_bytes()
    file.unlink()
    if damage != "removed":
        file.write_bytes(data[:-1] if damage == "cut" else data + b"x")
    execute(planned(source, target, resume=True))
    assert digests(target) == digests(tmp_path / "fresh")
