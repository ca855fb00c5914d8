"""Distillation of a split that is not exact: the error falls, and a stopped run ends with the same bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.model import Model, open_model
from ckptbridge.converters.upcycling.construction import upcycled
from ckptbridge.converters.upcycling.spec import UpcycleSpec
from ckptbridge.trainer.upcycle_recipe import DistillSection
from ckptbridge.trainer.upcycling.distillation import distillation_text, distilled
from ckptbridge.trainer.upcycling.samples import sample_mlps
from ckptbridge.trainer.upcycling.scratch import DistilledLayer, check_scratch, remove_scratch
from tests.tiny import save_tiny
from tests.trainer.text import save_tokenizer

SPLIT = UpcycleSpec(num_experts=4, topk=2, method="split", seed=2)
OPTIONS = DistillSection(tokens=1500, lr=3e-3, batch=50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("distilled") / "llama")


def split_of(folder: Path, **values: object) -> tuple[Model, Model]:
    dense = open_model(folder)
    return dense, upcycled(dense, replace(SPLIT, **values))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_error_of_every_layer_falls(folder: Path, tmp_path: Path) -> None:
    dense, mixture = split_of(folder)
    seen: list[DistilledLayer] = []
    model, told = distilled(dense, mixture, OPTIONS, tmp_path / "work", on_layer=seen.append)
    assert seen == told
    assert [layer.layer for layer in told] == [0, 1, 2, 3]
    for layer in told:
        assert layer.after < 0.9 * layer.before
    assert model.tensors.keys() == mixture.tensors.keys()
    for name, tensor in model.tensors.items():
        assert (tensor.shape, tensor.dtype) == (mixture.tensors[name].shape, mixture.tensors[name].dtype)
        assert torch.equal(tensor.read(), mixture.tensors[name].read()) != (".mlp." in name), name
    assert model.derivation != mixture.derivation


def test_the_errors_are_those_of_the_weights(folder: Path, tmp_path: Path) -> None:
    """Measured anew, with nothing of the module that was trained, on tokens that it was not trained on."""
    dense, mixture = split_of(folder)
    model, told = distilled(dense, mixture, OPTIONS, tmp_path / "work")
    ids = torch.randint(dense.config.vocab_size, (300,), generator=torch.Generator().manual_seed(7))

    def errors(of: Model) -> dict[int, float]:
        found: dict[int, float] = {}

        def look(sample: object) -> None:
            held = {n: t.read() for n, t in of.tensors.items() if f"layers.{sample.layer}.mlp." in n}
            stem = f"decoder.layers.{sample.layer}.mlp."
            logits = sample.input_TH @ held[f"{stem}router.weight"].T
            best = logits.topk(2, -1)
            made = torch.zeros_like(sample.output_TH)
            for row, (weights, experts) in enumerate(zip(best.values.softmax(-1), best.indices, strict=True)):
                for weight, expert in zip(weights, experts.tolist(), strict=True):
                    gate_up = held[f"{stem}experts.experts.{expert}.linear_fc1.weight"] @ sample.input_TH[row]
                    gate, up = gate_up.chunk(2)
                    hidden = torch.nn.functional.silu(gate) * up
                    made[row] += weight * (held[f"{stem}experts.experts.{expert}.linear_fc2.weight"] @ hidden)
            found[sample.layer] = ((made - sample.output_TH).norm() / sample.output_TH.norm()).item()

        sample_mlps(dense, [ids], look)
        return found

    before, after = errors(mixture), errors(model)
    for layer in told:
        assert before[layer.layer] == pytest.approx(layer.before, rel=0.15)
        assert after[layer.layer] == pytest.approx(layer.after, rel=0.15)


def test_a_stopped_run_ends_with_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    dense, mixture = split_of(folder)
    _, whole = distilled(dense, mixture, OPTIONS, tmp_path / "whole")

    def stop(layer: DistilledLayer) -> None:
        if layer.layer == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distilled(dense, mixture, OPTIONS, tmp_path / "stopped", on_layer=stop)
    assert len(bytes_of(tmp_path / "stopped")) == 4
    (tmp_path / "stopped" / "layer_0002.safetensors").write_bytes(b"half of a layer")
    first = (tmp_path / "stopped" / "layer_0000.safetensors").stat().st_mtime_ns
    torch.randn(5)
    model, told = distilled(dense, mixture, OPTIONS, tmp_path / "stopped")
    assert told == whole
    assert bytes_of(tmp_path / "stopped") == bytes_of(tmp_path / "whole")
    assert (tmp_path / "stopped" / "layer_0000.safetensors").stat().st_mtime_ns == first
    assert model.derivation == distilled(dense, mixture, OPTIONS, tmp_path / "whole")[0].derivation


def test_files_of_other_options_are_not_taken(folder: Path, tmp_path: Path) -> None:
    dense, mixture = split_of(folder)
    _, one = distilled(dense, mixture, OPTIONS, tmp_path)
    _, other = distilled(dense, mixture, OPTIONS, tmp_path, seed=1)
    assert [layer.after for layer in one] != [layer.after for layer in other]
    _, third = distilled(dense, split_of(folder, seed=3)[1], OPTIONS, tmp_path, seed=1)
    assert [layer.before for layer in third] != [layer.before for layer in other]


def test_without_training_nothing_falls(folder: Path, tmp_path: Path) -> None:
    dense, mixture = split_of(folder)
    model, told = distilled(dense, mixture, OPTIONS.model_copy(update={"lr": 1e-30}), tmp_path)
    assert [layer.after for layer in told] == [layer.before for layer in told]
    assert all(torch.equal(model.tensors[name].read(), t.read()) for name, t in mixture.tensors.items())


def test_a_layer_that_gets_worse_stays_as_it_was(folder: Path, tmp_path: Path) -> None:
    dense, mixture = split_of(folder)
    model, told = distilled(dense, mixture, OPTIONS.model_copy(update={"lr": 30.0}), tmp_path)
    assert [layer.after for layer in told] == [layer.before for layer in told]
    assert all(torch.equal(model.tensors[name].read(), t.read()) for name, t in mixture.tensors.items())


def test_layers_that_stay_dense_are_left_alone_and_bf16_is_kept(tmp_path: Path) -> None:
    dense, mixture = split_of(save_tiny("qwen2", tmp_path / "dense", torch.bfloat16), layers="1,2")
    model, told = distilled(dense, mixture, OPTIONS, tmp_path / "work")
    assert [layer.layer for layer in told] == [1, 2]
    assert all(layer.after < 0.9 * layer.before for layer in told)
    for name, tensor in model.tensors.items():
        changed = name.startswith(("decoder.layers.1.mlp.", "decoder.layers.2.mlp."))
        assert tensor.dtype == mixture.tensors[name].dtype
        assert changed or tensor is mixture.tensors[name]


# ---- the text -------------------------------------------------------------------------------------------------------


def test_a_text_needs_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a b c")
    with pytest.raises(BadInputError, match="tokenizer"):
        distillation_text(open_model(folder), OPTIONS, tmp_path / "text.txt")


@pytest.mark.parametrize("tokens", [1, 2])
def test_too_few_tokens_are_refused_before_the_folder_is_made(tokens: int, folder: Path, tmp_path: Path) -> None:
    dense, mixture = split_of(folder)
    with pytest.raises(BadInputError, match=rf"distill\.tokens is {tokens}: it must be at least 3"):
        distilled(dense, mixture, OPTIONS.model_copy(update={"tokens": tokens}), tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_the_fewest_tokens_can_be_trained_on_and_measured(folder: Path, tmp_path: Path) -> None:
    dense, mixture = split_of(folder)
    _, told = distilled(dense, mixture, OPTIONS.model_copy(update={"tokens": 3}), tmp_path / "work")
    assert all(0 < layer.after <= layer.before for layer in told)


def test_a_short_text_is_refused(tmp_path: Path) -> None:
    save_tokenizer(save_tiny("llama", tmp_path / "llama"))
    dense = open_model(tmp_path / "llama")
    for words in ("ab", "abc"):
        (tmp_path / "text.txt").write_text(words)
        found = f"text.txt: the text has {len(words)} tokens: distillation needs at least 4"
        with pytest.raises(BadInputError, match=found):
            distillation_text(dense, OPTIONS, tmp_path / "text.txt")
    (tmp_path / "text.txt").write_text("abcd")
    assert [len(ids_S) for ids_S in distillation_text(dense, OPTIONS, tmp_path / "text.txt").sequences] == [2, 2]


# ---- the folder -----------------------------------------------------------------------------------------------------


def test_a_folder_of_layers_is_ours(folder: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    check_scratch(work)
    distilled(*split_of(folder), OPTIONS.model_copy(update={"tokens": 100}), work)
    (work / "layer_0003.safetensors.tmp").write_bytes(b"of a run that was stopped")
    check_scratch(work)
    remove_scratch(work)
    assert not work.exists()


def test_what_came_into_the_folder_meanwhile_stays(tmp_path: Path) -> None:
    for name in ("layer_0000.safetensors", "layer_0000.json", "layer_1.json", "mine.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "layer_0001.json").mkdir()
    remove_scratch(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layer_0001.json", "layer_1.json", "mine.txt"]


@pytest.mark.parametrize("kind", ["file", "link", "dangling link", "other files", "a folder of a layer's name"])
def test_another_folder_is_refused(kind: str, tmp_path: Path) -> None:
    work, other = tmp_path / "work", tmp_path / "other"
    other.mkdir()
    if kind == "file":
        work.write_text("mine")
    elif "link" in kind:
        work.symlink_to(other if kind == "link" else tmp_path / "none")
    elif kind == "other files":
        work.mkdir()
        (work / "layer_0000.json").write_text("{}")
        (work / "config.json").write_text("{}")
    else:
        (work / "layer_0000.json").mkdir(parents=True)
    with pytest.raises(BadInputError, match="move it away, or name another target"):
        check_scratch(work)
