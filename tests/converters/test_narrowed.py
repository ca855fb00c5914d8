"""A finite weight that fp16 makes infinite is counted, told by name, and refused when asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptbridge.converters.convert import ConvertOptions, cast_all, plan_conversion
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.finite import NotFinite, finite_notes
from ckptbridge.converters.hf_folder import read_json
from ckptbridge.converters.journal import Journal, Record, read_journal
from ckptbridge.converters.model import open_model
from ckptbridge.converters.narrowed import Narrowing, casts_watched
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.tensors import InMemory
from ckptbridge.converters.witness import Witness
from tests.conftest import TinyFolders
from tests.converters.fp8_models import PUBLISHED, held, quantised, write_folder
from tests.converters.running import begin, planned
from tests.converters.test_finite import PLACES, poisoned
from tests.converters.test_mxfp4 import both

LARGE = {3: 1e5, 20: -7e4, 21: 65519.0, 40: -65520.0}
"""Of fp32: fp16 rounds the third to 65504 and the last to infinity."""


def infinities(target: Path) -> int:
    """How many numbers of a Megatron checkpoint are infinite."""
    return sum(int(tensor.read().isinf().sum()) for tensor in open_model(target).tensors.values())


@pytest.mark.parametrize(
    "options", [{}, {"layout": ParallelLayout(tp=2)}, {"layout": ParallelLayout(tp=2), "workers": 3}], ids=str
)
@pytest.mark.parametrize("place", PLACES)
def test_it_is_told_wherever_it_stands(
    place: str, options: dict[str, Any], tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    source = poisoned(tiny_folder("llama"), tmp_path / "source", PLACES[place], LARGE)
    receipt = execute(planned(source, tmp_path / "target", dtype=torch.float16, **options))
    assert infinities(tmp_path / "target") == 3
    assert receipt.not_finite.keys() == {PLACES[place]}
    assert receipt.not_finite[PLACES[place]]["infinite"] == 0  # in the source
    (note,) = (note for note in receipt.notes if PLACES[place] in note)
    assert "3 finite numbers" in note
    assert "100000" in note
    with pytest.raises(BadInputError) as refused:
        execute(planned(source, tmp_path / "refused", dtype=torch.float16, check_finite=True, **options))
    for word in (PLACES[place], "model.safetensors", "3 finite numbers", "100000", "--check-finite"):
        assert word in str(refused.value)
    assert not (tmp_path / "refused").exists()


def test_what_is_not_finite_in_the_source_is_not_counted_twice(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    planted = {1: float("nan"), 2: float("inf")} | LARGE
    source = poisoned(tiny_folder("llama"), tmp_path / "source", PLACES["gated"], planted)
    receipt = execute(planned(source, tmp_path / "target", dtype=torch.float16))
    assert receipt.not_finite[PLACES["gated"]].items() >= {"nan": 1, "infinite": 1}.items()
    assert any("1 NaN and 1 infinite" in note and "element 1" in note for note in receipt.notes)
    assert any("3 finite numbers" in note for note in receipt.notes)


def test_it_is_told_on_the_way_back_too(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = poisoned(tiny_folder("llama"), tmp_path / "source", PLACES["qkv"], LARGE)
    execute(planned(source, tmp_path / "mcore", layout=ParallelLayout(tp=2)))
    receipt = execute(planned(tmp_path / "mcore", tmp_path / "hf", "hf", dtype=torch.float16))
    (name,) = receipt.not_finite
    assert "linear_qkv" in name
    assert name in receipt.source_tensors
    assert any("3 finite numbers" in note for note in receipt.notes)


@pytest.mark.parametrize("value", [65519.0, -65519.0])
def test_what_fp16_still_rounds_to_a_number_is_none_of_them(
    value: float, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    source = poisoned(tiny_folder("llama"), tmp_path / "source", PLACES["row"], {5: value})
    receipt = execute(planned(source, tmp_path / "target", dtype=torch.float16, check_finite=True))
    assert receipt.not_finite == {}
    assert not any("finite" in note for note in receipt.notes)


def test_it_is_told_of_mxfp4(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source, _ = both(tiny_folder("gpt_oss"), tmp_path)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj_blocks"
    tensors[name][1, 0, 0, :] = 0x77  # 6, the largest
    tensors[name.replace("blocks", "scales")][1, 0, 0] = 127 + 14
    save_file(tensors, source / "model.safetensors")
    receipt = execute(plan_conversion(open_model(source), tmp_path / "bf16", "torch_dist", ConvertOptions()))
    assert receipt.not_finite == {}
    options = ConvertOptions(dtype=torch.float16)
    receipt = execute(plan_conversion(open_model(source), tmp_path / "fp16", "torch_dist", options))
    assert receipt.not_finite.keys() == {name}
    assert any("32 finite numbers" in note and "98304" in note for note in receipt.notes)
    options = ConvertOptions(dtype=torch.float16, check_finite=True)
    plan = plan_conversion(open_model(source), tmp_path / "refused", "torch_dist", options)
    with pytest.raises(BadInputError, match="down_proj_blocks"):
        execute(plan)


def test_it_is_told_of_fp8(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    tensors, name = held(tiny_folder("qwen3")), "model.layers.1.mlp.down_proj.weight"
    codes, scales = quantised(tensors[name] / tensors[name].abs().max() * 1e5, (128, 128))
    tensors |= {name: codes, f"{name}_scale_inv": scales}
    config = read_json(tiny_folder("qwen3") / "config.json") | {"quantization_config": PUBLISHED, "dtype": "bfloat16"}
    source = write_folder(tmp_path / "source", config, tensors)
    receipt = execute(planned(source, tmp_path / "bf16", dtype=torch.bfloat16))
    assert receipt.not_finite == {}
    receipt = execute(planned(source, tmp_path / "fp16", dtype=torch.float16))
    assert receipt.not_finite.keys() == {name}
    assert any(f"{infinities(tmp_path / 'fp16')} finite numbers" in note for note in receipt.notes)


def test_a_resumed_run_remembers_it(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = poisoned(tiny_folder("llama"), tmp_path / "source", PLACES["vocabulary"], LARGE)
    target = tmp_path / "target"
    begin(planned(source, target, dtype=torch.float16), 0.9)
    assert PLACES["vocabulary"] in json.loads((tmp_path / "target.partial.journal").read_text().splitlines()[1])["bad"]
    with pytest.raises(BadInputError, match="3 finite numbers"):
        execute(planned(source, target, dtype=torch.float16, resume=True, check_finite=True))
    receipt = execute(planned(source, target, dtype=torch.float16, resume=True))
    assert list(receipt.not_finite) == [PLACES["vocabulary"]]


def test_a_tensor_is_counted_once_however_many_blocks_it_has() -> None:
    """And the parts of one tensor together."""
    witness = Witness({})
    for part in (torch.tensor([[7e4, 1.0], [torch.inf, -9e4]]), torch.tensor([[8e4]])):
        whole = cast_all({"w": InMemory(part)}, torch.float16)["w"]
        with casts_watched(witness.see_cast):
            for row in (*range(len(part)), 0):
                whole.read_rows(row, row + 1)
    assert witness.bad() == {"w": NotFinite(overflowed=3, largest=9e4)}


def test_the_journal_tells_what_is_found_after_the_digest(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.begin("plan")
    journal.add_file("one", {}, {"w": "digest"}, {"w": NotFinite(nan=1, first=4)})
    later = {"w": NotFinite(nan=1, first=4, overflowed=2, largest=7e4)}
    journal.add_file("two", {}, {"w": "digest"}, later)
    journal.add_sources({"w": "digest"}, later)
    lines = (tmp_path / "journal").read_text().splitlines()
    assert [bool(json.loads(line).get("bad")) for line in lines] == [False, True, True, False]
    assert read_journal(tmp_path / "journal")[1].bad == later


def test_ranks_add_to_what_others_found() -> None:
    whole, part = NotFinite(nan=2, infinite=1, first=9), NotFinite(nan=1, first=30, overflowed=5, largest=1e5)
    for first, second in ((whole, part), (part, whole)):
        record = Record(bad={"w": first})
        record.add(Record(bad={"w": second}))
        assert record.bad == {"w": NotFinite(nan=2, infinite=1, first=9, overflowed=5, largest=1e5)}


def test_the_notes_tell_one_from_the_other() -> None:
    lost, bad = NotFinite(overflowed=5, largest=1e5), NotFinite(nan=1, first=3)
    assert finite_notes({}) == ()
    (note,) = finite_notes({"w": lost})
    assert note.startswith("1 tensors hold numbers that are finite in the source and infinite in the result: w: 5")
    of_source, of_result = finite_notes({"w": lost, "v": bad})
    assert of_source.startswith("1 tensors of the source hold numbers that are not finite")
    assert "v: 1 NaN" in of_source
    assert "w: 5" in of_result
    assert lost.counts() == {"nan": 0, "infinite": 0, "overflowed": 5}
    assert bad.counts() == {"nan": 1, "infinite": 0}


@pytest.mark.parametrize(
    ("before", "after", "is_watched"),
    [
        (torch.bfloat16, torch.float16, True),
        (torch.float32, torch.float16, True),
        (torch.float64, torch.float32, True),
        (torch.float32, torch.bfloat16, False),
        (torch.float16, torch.bfloat16, False),
        (torch.float16, torch.float32, False),
        (torch.float16, torch.float16, False),
    ],
)
def test_only_casts_to_a_dtype_that_ends_sooner_are_looked_at(
    before: torch.dtype, after: torch.dtype, is_watched: bool
) -> None:
    told: list[Narrowing] = []
    made = cast_all({"w": InMemory(torch.full((3, 4), torch.inf, dtype=before))}, after)["w"]
    with casts_watched(told.append):
        made.read()
    assert bool(told) is is_watched
    assert [narrowing.counted() for narrowing in told] == [None] * is_watched
    made.read()  # nobody listens
