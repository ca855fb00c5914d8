"""Measurements that the trainer makes for the converters: from a text and from prompts to a mixture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.model import Model, open_model
from ckptbridge.converters.tensors import Checkpoint, scaled
from ckptbridge.converters.upcycling.construction import upcycled
from ckptbridge.converters.upcycling.measured import LayerMeasurement
from ckptbridge.converters.upcycling.spec import UpcycleSpec
from ckptbridge.trainer.text_ids import text_ids, windows
from ckptbridge.trainer.upcycling.measure import measure, measure_files
from ckptbridge.trainer.upcycling.prompts import ExpertPrompts, read_prompts
from ckptbridge.trainer.upcycling.report import report
from ckptbridge.trainer.upcycling.samples import sample_mlps
from tests.conftest import TinyFolders
from tests.tiny import NUM_LAYERS, VOCAB_SIZE, save_tiny, token_ids
from tests.trainer.text import save_tokenizer

IDS = list(token_ids())
CALIBRATION = list(torch.randint(0, VOCAB_SIZE, (8, 32), generator=torch.Generator().manual_seed(9)))


def spec(**values: Any) -> UpcycleSpec:
    return UpcycleSpec(**{"num_experts": 4, "seed": 3, **values})


def relative(dense: Model, values: UpcycleSpec, measured: Any) -> float:
    found = report(dense, upcycled(dense, values, measured), values, IDS)
    assert found.passed
    return found.logits[0].kl


@pytest.mark.parametrize(
    "values",
    [
        {"method": "split", "split": "clustering"},
        {"method": "cmoe", "num_experts": 6},
        {"method": "split", "router_init": "neurons"},
        {"router": "pre-softmax", "router_std": 0.2},
    ],
    ids=str,
)
def test_a_text_is_measured_layer_by_layer_and_the_mixture_is_built(
    values: dict[str, Any], tiny_folder: TinyFolders
) -> None:
    dense, wanted = open_model(tiny_folder("llama")), spec(**values)
    done: list[tuple[int, int]] = []
    measured = measure(dense, wanted, CALIBRATION, on_progress=lambda *at: done.append(at))
    assert sorted(measured) == list(range(NUM_LAYERS))
    assert len(done) == NUM_LAYERS
    assert relative(dense, wanted, measured) > 0
    some = measure(dense, spec(**values, layers="1,3"), CALIBRATION)
    assert sorted(some) == [1, 3]
    for layer, found in some.items():
        assert found.scale == pytest.approx(measured[layer].scale, rel=1e-5)


def test_a_calibrated_router_is_nearer_to_the_dense_model(tiny_folder: TinyFolders) -> None:
    dense, wanted = open_model(tiny_folder("llama")), spec(router="pre-softmax", router_std=0.2)
    measured = measure(dense, wanted, CALIBRATION)
    assert all(found.scale != 1 for found in measured.values())
    assert relative(dense, wanted, measured) < relative(dense, wanted, None) / 2


def test_what_needs_no_text_is_not_run(tiny_folder: TinyFolders) -> None:
    dense = open_model(tiny_folder("llama"))
    unreadable: Checkpoint = {}
    assert measure(Model(**{**fields_of(dense), "tensors": unreadable}), spec(), CALIBRATION) == {}
    assert measure(dense, spec(router="pre-softmax")) == {}


def fields_of(model: Model) -> dict[str, Any]:
    return {name: getattr(model, name) for name in model.__dataclass_fields__}


def test_a_mixture_is_measured_for_fewer_experts(tiny_folder: TinyFolders) -> None:
    source = open_model(tiny_folder("mixtral"))
    for method in ("prune", "merge"):
        wanted = UpcycleSpec(num_experts=2, method=method)
        measured = measure(source, wanted, CALIBRATION)
        assert sorted(measured) == list(range(NUM_LAYERS))
        assert relative(source, wanted, measured) > 0
        with pytest.raises(BadInputError, match="--calibrate"):
            measure(source, wanted)
    assert measure(source, UpcycleSpec(num_experts=8, method="expert-upcycling")) == {}


def prompts(*lengths: int) -> list[ExpertPrompts]:
    """One entry for each length: two positive prompts, and a negative one from the second entry on."""
    made: list[ExpertPrompts] = []
    for number, length in enumerate(lengths):
        ids = torch.randint(0, VOCAB_SIZE, (3, length), generator=torch.Generator().manual_seed(number))
        made.append(ExpertPrompts((ids[0], ids[1, :-1]), (ids[2],) if number else ()))
    return made


def inputs_of(model: Model, ids_S: Tensor) -> dict[int, Tensor]:
    """What each MLP sees of one text by itself."""
    seen: dict[int, Tensor] = {}
    sample_mlps(model, [ids_S], lambda sample: seen.__setitem__(sample.layer, sample.input_TH))
    return seen


@pytest.mark.parametrize("text", [[], CALIBRATION], ids=["prompts", "prompts and text"])
def test_rows_are_the_mean_inputs_of_prompts(text: list[Tensor], tiny_folder: TinyFolders) -> None:
    dense = open_model(tiny_folder("llama"))
    wanted = spec(num_experts=6, topk=2, granularity=2, router_init="hidden-state", router="renormalised")
    given = prompts(5, 7, 3)
    measured = measure(dense, wanted, text, given)
    for number, entry in enumerate(given):
        positive = [inputs_of(dense, ids_S) for ids_S in entry.positive]
        negative = [inputs_of(dense, ids_S) for ids_S in entry.negative]
        for layer in range(NUM_LAYERS):
            row = torch.cat([seen[layer] for seen in positive]).mean(0)
            if negative:
                row = row - torch.cat([seen[layer] for seen in negative]).mean(0)
            row = row / row.square().mean().sqrt()  # 8 / sqrt(64), the spread of virtual groups
            rows = measured[layer].router_rows
            assert rows is not None
            assert rows.shape == (3, 64)
            assert (rows[number] - row).abs().max() <= 1e-6
    found = report(dense, upcycled(dense, wanted, measured), wanted, IDS)
    assert found.passed
    assert found.is_exact  # whatever the rows are, those of a group are equal
    assert found.logits[0].max_relative_difference < 1e-5


def test_prompts_pull_their_own_tokens(tiny_folder: TinyFolders) -> None:
    """Each prompt's tokens go to the expert of their own prompt more often than to any other."""
    dense = open_model(tiny_folder("llama"))
    wanted = UpcycleSpec(num_experts=2, topk=1, router_init="hidden-state", router_std=1.0, allow_inexact=True)
    one, two = (torch.randint(0, VOCAB_SIZE, (12,), generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    given = [ExpertPrompts((one,), (two,)), ExpertPrompts((two,), (one,))]
    moe = upcycled(dense, wanted, measure(dense, wanted, (), given))
    loads = [report(dense, moe, wanted, ids).layers[0].load for ids in (one, two)]
    assert loads[0][0] > loads[0][1]
    assert loads[1][1] > loads[1][0]


def test_several_models_are_measured_as_the_mixture_has_them(tiny_folder: TinyFolders) -> None:
    one = open_model(tiny_folder("llama"))
    wanted = UpcycleSpec(num_experts=2, method="branch-train-mix", router_init="hidden-state")
    other = Model(**{**fields_of(one), "tensors": {n: scaled(t, 3.0) for n, t in one.tensors.items()}})
    mean = Model(**{**fields_of(one), "tensors": {n: scaled(t, 2.0) for n, t in one.tensors.items()}})
    found = measure(one, wanted, (), prompts(4, 4), others=[other])
    expected = measure(mean, spec(num_experts=2, router_init="hidden-state"), (), prompts(4, 4))
    alone = measure(one, spec(num_experts=2, router_init="hidden-state"), (), prompts(4, 4))
    for layer in range(NUM_LAYERS):
        assert torch.allclose(rows_of(found[layer]), rows_of(expected[layer]), atol=1e-7)
        assert not torch.allclose(rows_of(found[layer]), rows_of(alone[layer]), atol=1e-4)


def rows_of(found: LayerMeasurement) -> Tensor:
    assert found.router_rows is not None
    return found.router_rows


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"method": "split", "split": "clustering"}, ("split", "--calibrate")),
        ({"method": "cmoe"}, ("method cmoe", "--calibrate")),
        ({"method": "split", "router_init": "neurons"}, ("router_init neurons", "--calibrate")),
        ({"router_init": "hidden-state"}, ("hidden-state", "--prompts")),
        ({"topk": 3, "granularity": 2}, ("topk 3",)),
    ],
    ids=str,
)
def test_what_is_missing_is_named(values: dict[str, Any], words: tuple[str, ...], tiny_folder: TinyFolders) -> None:
    with pytest.raises(BadInputError) as refused:
        measure(open_model(tiny_folder("llama")), spec(**values))
    assert all(word in str(refused.value) for word in words)


def test_prompts_of_another_number_are_refused(tiny_folder: TinyFolders) -> None:
    dense = open_model(tiny_folder("llama"))
    with pytest.raises(BadInputError, match="3 rows of the router, but it has 2: one for each group of 2 experts"):
        measure(dense, spec(granularity=2, router_init="hidden-state"), (), prompts(4, 4, 4))


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = save_tiny("llama", tmp_path_factory.mktemp("speaking") / "llama")
    save_tokenizer(folder)
    return open_model(folder)


YAML = """
- positive: ["abc", "hello there"]
  negative:
    - zzz
- positive:
    - some words
"""


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_prompts_come_from_a_file(form: str, speaking: Model, tmp_path: Path) -> None:
    entries = [{"positive": ["abc", "hello there"], "negative": ["zzz"]}, {"positive": ["some words"]}]
    path = tmp_path / f"prompts.{form}"
    path.write_text(YAML if form == "yaml" else json.dumps(entries))
    found = read_prompts(path, [speaking], spec(granularity=2))
    assert [[len(ids) for ids in entry.positive] for entry in found] == [[3, 11], [10]]
    assert [[len(ids) for ids in entry.negative] for entry in found] == [[3], []]
    assert found[0].negative[0].unique().numel() == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1, 2", ("YAML",)),
        ("a: 1", ("list", "dict")),
        ("[]", ("0 entries", "expected 2", "group of 2 experts")),
        ("[{positive: [a]}]", ("1 entries", "expected 2")),
        ("[{positive: [a]}, 3]", ("entry 1", "int")),
        ("[{positive: [a]}, {positive: [a], name: b}]", ("entry 1", "'name'")),
        ("[{negative: [a]}, {positive: [a]}]", ("entry 0", "positive")),
        ("[{positive: [a]}, {positive: []}]", ("entry 1", "positive")),
        ("[{positive: a}, {positive: [b]}]", ("entry 0", "list of texts", "'a'")),
        ("[{positive: [a]}, {positive: [b, 7]}]", ("entry 1", "list of texts")),
        ("[{positive: [a]}, {positive: [b], negative: ['']}]", ("entry 1", "negative", "no tokens")),
    ],
)
def test_prompts_that_are_wrong_are_named(text: str, words: tuple[str, ...], speaking: Model, tmp_path: Path) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text(text)
    with pytest.raises(BadInputError) as refused:
        read_prompts(path, [speaking], spec(granularity=2))
    assert str(path) in str(refused.value)
    assert all(word in str(refused.value) for word in words), str(refused.value)


def test_prompts_need_a_file_and_a_tokenizer(speaking: Model, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no such file"):
        read_prompts(tmp_path / "absent.yaml", [speaking], spec(granularity=2))
    (tmp_path / "prompts.yaml").write_text(YAML)
    with pytest.raises(BadInputError, match="no tokenizer"):
        read_prompts(tmp_path / "prompts.yaml", [open_model(tiny_folder("llama"))], spec(granularity=2))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(BadInputError, match=r"bytes\.yaml"):
        read_prompts(tmp_path / "bytes.yaml", [speaking], spec(granularity=2))


def test_files_are_measured_as_what_is_in_them(speaking: Model, tmp_path: Path) -> None:
    text, prompts_file = tmp_path / "text.txt", tmp_path / "prompts.yaml"
    text.write_text("some text of many letters " * 20)
    prompts_file.write_text(YAML)
    both = {"granularity": 2, "router_init": "hidden-state", "router": "pre-softmax"}
    found = measure_files(speaking, spec(**both), text, prompts_file)
    ids, _ = text_ids([speaking], text.read_text(), None)
    given = read_prompts(prompts_file, [speaking], spec(granularity=2))
    expected = measure(speaking, spec(**both), windows(ids, 128), given)
    for layer in range(NUM_LAYERS):
        assert torch.equal(rows_of(found[layer]), rows_of(expected[layer]))
        assert found[layer].scale == expected[layer].scale != 1
    assert measure_files(speaking, spec(), None, None) == {}
    with pytest.raises(BadInputError, match=r"absent\.txt"):
        measure_files(speaking, spec(**both), tmp_path / "absent.txt", prompts_file)


def test_texts_become_windows(speaking: Model) -> None:
    ids, described = text_ids([speaking], "some text of many letters", None)
    assert (len(ids), described) == (25, "the text given")
    assert [len(part) for part in windows(ids, 10)] == [10, 10, 5]
    assert [len(part) for part in windows(ids, 12)] == [12, 12]
    assert torch.equal(torch.cat(windows(ids, 12)), ids[:24])
